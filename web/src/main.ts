// The address after # names what is shown; each view is a function of its parts.
import { fill, h, notice } from "./dom";
import { takeDrops } from "./drop";
import { trail } from "./trail";
import { compareView } from "./views/compare";
import { oneFeature } from "./views/feature";
import { featureList } from "./views/features";
import { graphView } from "./views/graph";
import { library } from "./views/library";
import { mapView } from "./views/map";
import { runView } from "./views/run";

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
  trail();
  try {
    const parts = path.split("/").map(decodeURIComponent);
    const left = await view(main, parts, new URLSearchParams(query));
    if (mine === turn) leave = left;
    else left?.();
  } catch (error) {
    const back = h("p", {}, h("a", { href: "#/" }, "Back to the library"));
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

window.addEventListener("hashchange", () => {
  if (location.hash !== "#main") void show();
});
window.addEventListener("unhandledrejection", (event) => {
  notice((event.reason as Error).message);
  event.preventDefault();
});
takeDrops();
void show();
