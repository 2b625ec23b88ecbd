// Elements from data. Texts are always text, never HTML: labels and tokens may hold anything.
export type Child = Node | string | number | null | undefined | false;
type Attributes = Record<string, string | number | boolean | undefined | ((event: never) => void)>;

export function h<K extends keyof HTMLElementTagNameMap>(
  tag: K,
  attributes: Attributes = {},
  ...children: Child[]
): HTMLElementTagNameMap[K] {
  const element = document.createElement(tag);
  set(element, attributes);
  fill(element, ...children);
  return element;
}

export function s(tag: string, attributes: Attributes = {}, ...children: Child[]): SVGElement {
  const element = document.createElementNS("http://www.w3.org/2000/svg", tag);
  set(element, attributes);
  fill(element, ...children);
  return element;
}

function set(element: Element, attributes: Attributes): void {
  for (const [name, value] of Object.entries(attributes)) {
    if (typeof value === "function") element.addEventListener(name, value as unknown as EventListener);
    else if (value !== undefined && value !== false) element.setAttribute(name, value === true ? "" : String(value));
  }
}

export function fill(element: Element, ...children: Child[]): void {
  const shown = children.filter((c): c is Node | string | number => c !== null && c !== undefined && c !== false);
  element.replaceChildren(...shown.map((c) => (typeof c === "number" ? String(c) : c)));
}

export const button = (text: string, click: (event: Event) => void, attributes: Attributes = {}): HTMLButtonElement =>
  h("button", { type: "button", click: click as (event: never) => void, ...attributes }, text);

let fields = 0;

// An input with its label above it; `around` stands in the input's place where it is not alone.
export function field(label: string, input: HTMLElement, around: HTMLElement = input): HTMLElement {
  input.id = `field-${fields++}`;
  return h("div", { class: "field" }, h("label", { for: input.id }, label), around);
}

export const section = (title: string, ...children: Child[]): HTMLElement =>
  h("section", { class: "card" }, h("h2", {}, title), ...children);

// A form that does its work here, and is sent nowhere.
export function form(work: () => void, ...children: Child[]): HTMLFormElement {
  return h(
    "form",
    {
      class: "row",
      submit: (event: Event) => {
        event.preventDefault();
        work();
      },
    },
    ...children,
  );
}

export function notice(text: string): void {
  const place = document.getElementById("notice")!;
  place.textContent = text;
  window.setTimeout(() => {
    if (place.textContent === text) place.textContent = "";
  }, 6000);
}

export function later<T extends unknown[]>(work: (...given: T) => void, ms = 180): (...given: T) => void {
  let timer = 0;
  return (...given) => {
    window.clearTimeout(timer);
    timer = window.setTimeout(() => work(...given), ms);
  };
}

export function download(blob: Blob, name: string): void {
  const link = h("a", { href: URL.createObjectURL(blob), download: name });
  link.click();
  window.setTimeout(() => URL.revokeObjectURL(link.href), 1000);
}
