// The address after # names what is shown; each view is a function of its parts.
import { compareView } from "./compare";
import { fill, h, notice, type Child } from "./dom";
import { takeDrops } from "./drop";
import { oneFeature } from "./feature";
import { featureList } from "./features";
import { graphView } from "./graph/view";
import { library } from "./library";
import { mapView } from "./map";
import { runView } from "./run";

type Leave = (() => void) | void;
let leave: Leave;
let turn = 0;

async function show(): Promise<void> {
  const mine = ++turn;
  const [path = "", query = ""] = location.hash.slice(2).split("?");
  leave?.();
  leave = undefined;
  const old = document.getElementById("main")!;
  // Each view has an element of its own, so that one that comes late writes where nobody looks.
  const main = h("main", { id: "main", tabindex: "-1", "aria-busy": "true" });
  old.replaceWith(main);
  fill(document.getElementById("trail")!);
  try {
    const parts = path.split("/").map(decodeURIComponent);
    const left = await view(main, parts, new URLSearchParams(query));
    if (mine === turn) leave = left;
    else left?.();
  } catch (error) {
    const back = h("p", {}, h("a", { href: "#/" }, "See what is here"));
    fill(main, h("h1", {}, "This cannot be shown"), h("p", { class: "error" }, (error as Error).message), back);
  }
  main.removeAttribute("aria-busy");
  document.body.dataset.shown = location.hash;
}

async function view(main: HTMLElement, parts: string[], query: URLSearchParams): Promise<Leave> {
  const [kind, id, a, b] = parts;
  if (!kind) return library(main);
  // Parts of addresses become parts of requests.
  if (parts.some((part) => /^\.{1,2}$|[/\\?#]/.test(part))) throw new Error(`There is no page ${location.hash}.`);
  if (kind === "run" && id) return runView(main, id);
  if (kind === "graph" && id) return graphView(main, id, query);
  if (kind === "compare" && id && a) return compareView(main, id, a);
  if (kind === "bundle" && id && a === "map") return mapView(main, id, query);
  if (kind === "bundle" && id && a && b) return oneFeature(main, id, Number(a), Number(b));
  if (kind === "bundle" && id) return featureList(main, id, query);
  throw new Error(`There is no page ${location.hash}.`);
}

export function trail(...parts: Child[]): void {
  const links = parts.filter(Boolean).map((p) => h("li", {}, p));
  fill(document.getElementById("trail")!, h("ol", {}, ...links));
}

window.addEventListener("hashchange", () => {
  if (location.hash !== "#main") void show();
});
window.addEventListener("unhandledrejection", (event) => {
  notice((event.reason as Error).message);
  event.preventDefault();
});
takeDrops();
void show();
