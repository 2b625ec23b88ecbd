// Where one is: the links in the page's header.
import { fill, h, type Child } from "./dom";

export function trail(...parts: Child[]): void {
  const links = parts.filter(Boolean).map((p) => h("li", {}, p));
  fill(document.getElementById("trail")!, links.length > 0 && h("ol", {}, ...links));
}
