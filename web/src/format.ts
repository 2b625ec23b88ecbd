// Numbers and tokens as people read them.
import { button, fill, h } from "./dom";

export const percent = (x: number, digits = 1): string => `${(100 * x).toFixed(digits)} %`;
export const count = (x: number): string => x.toLocaleString("en");
export const name = (layer: number, index: number): string => `L${layer}/${index}`;
export const visible = (token: string): string => token.replaceAll("\n", "↵").replaceAll("\t", "→");

export function short(x: number | null | undefined): string {
  if (x === null || x === undefined || !Number.isFinite(x)) return "";
  if (x !== 0 && Math.abs(x) < 0.001) return x.toExponential(1);
  return Math.abs(x) >= 1000 ? count(Math.round(x)) : String(Number(x.toPrecision(3)));
}

export const signed = (x: number): string => (x > 0 ? `+${short(x)}` : short(x).replace("-", "−"));

// A token that stands alone, its blanks shown.
export const chip = (token: string): HTMLElement =>
  h("span", { class: "chip", title: JSON.stringify(token) }, visible(token) || "∅");

// A token on a ground that is the warmer the more active it is.
export function heat(token: string, share: number, title: string, peak = false): HTMLSpanElement {
  const span = h("span", { class: peak ? "token peak" : "token", title }, visible(token));
  if (share > 0)
    span.style.background = `rgba(var(--warm), calc(${(0.12 + 0.5 * Math.min(1, share)).toFixed(3)} * var(--heat)))`;
  return span;
}

// A bar of a share, drawn beside a number.
export function bar(share: number, cold = false): HTMLElement {
  const inner = h("span", { class: cold ? "fill cold" : "fill" });
  inner.style.width = `${Math.min(100, 100 * Math.abs(share)).toFixed(1)}%`;
  return h("span", { class: "bar", "aria-hidden": "true" }, inner);
}

// What a job is at, and a way to stop it.
export const stage =
  (place: Element) =>
  (said: string, stop: () => void): void =>
    fill(
      place,
      h("span", { class: "spin", "aria-hidden": "true" }),
      h("span", {}, ` ${said} … `),
      button("Stop", stop),
    );
