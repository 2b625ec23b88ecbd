// Supernodes: pinned nodes are grouped under a name, renamed, ungrouped, or added as suggested.
import { get, type Supernode } from "../api";
import { button, fill, form, h, notice, type Child } from "../dom";
import type { SavedView } from "./saved";
import type { Net } from "./net";

const MOST_SUGGESTED = 20;

export interface GroupHands {
  choose(i: number): void;
  hover(i: number): void;
  redraw(): void;
  controls(members: number[]): Child;
}

export class Supernodes {
  readonly grouping = h("div", {});
  readonly suggested = h("div", {});
  private readonly ticked = new Set<number>();
  private open = false;

  constructor(
    private readonly net: () => Net,
    private readonly saved: SavedView,
    private readonly hands: GroupHands,
  ) {}

  // Pinned nodes that stand alone, to be ticked and grouped.
  show(): void {
    const { pins, supernodes } = this.saved.view;
    const net = this.net();
    const grouped = new Set(supernodes.flatMap((s) => s.members));
    const free = pins.filter((n) => !grouped.has(n) && net.at.has(n));
    if (!free.length) return fill(this.grouping);
    for (const n of this.ticked) if (!free.includes(n)) this.ticked.delete(n);
    const called = h("input", { size: 18, maxlength: 200, placeholder: "name", "aria-label": "Name of the supernode" });
    const make = (): void => {
      if (!this.ticked.size || !called.value.trim()) return notice("tick pinned nodes and give a name first");
      this.saved.group(this.unused(called.value.trim()), [...this.ticked]);
      this.hands.redraw();
    };
    const details = h(
      "details",
      { open: this.open },
      h("summary", {}, "Group pinned nodes"),
      form(make, called, h("button", {}, "Group")),
      h("ul", { class: "list" }, ...free.map((n) => this.tick(n))),
    );
    details.addEventListener("toggle", () => (this.open = details.open));
    fill(this.grouping, details);
  }

  private tick(n: number): HTMLElement {
    const [net, i] = [this.net(), this.net().at.get(n)!];
    const box = h("input", { type: "checkbox", checked: this.ticked.has(n) });
    box.addEventListener("change", () => (box.checked ? this.ticked.add(n) : this.ticked.delete(n)));
    return h("li", {}, h("label", {}, box, ` ${net.label(i)} `, h("span", { class: "soft" }, net.graph.nodes.name[i])));
  }

  private unused(name: string): string {
    const names = new Set(this.saved.view.supernodes.map((s) => s.name));
    let [free, n] = [name, 2];
    while (names.has(free)) free = `${name} ${n++}`;
    return free;
  }

  // One supernode in the pane beside the graph.
  pane(into: HTMLElement, s: Supernode): void {
    const net = this.net();
    const called = h("input", { value: s.name, size: 20, maxlength: 200, "aria-label": "Name of the supernode" });
    const rename = (): void => {
      const name = called.value.trim();
      if (!name || name === s.name) return;
      const renamed = this.saved.rename(s.name, this.unused(name));
      this.hands.redraw();
      this.pane(into, renamed);
    };
    const apart = button("Ungroup", () => {
      this.saved.ungroup(s.name);
      this.hands.redraw();
      this.hands.choose(-1);
    });
    const members = s.members.map((n) => net.at.get(n)).filter((i): i is number => i !== undefined);
    const lines = members.map((i) =>
      h(
        "li",
        { mouseenter: () => this.hands.hover(i), mouseleave: () => this.hands.hover(-1) },
        button(net.label(i), () => this.hands.choose(i), { class: "plain label" }),
        h("span", { class: "soft" }, net.graph.nodes.name[i]),
      ),
    );
    fill(
      into,
      h("h2", {}, s.name),
      form(rename, called, h("button", {}, "Rename"), apart),
      this.hands.controls(s.members),
      h("h3", {}, "Members"),
      h("ul", { class: "list" }, ...lines),
    );
  }

  async suggest(): Promise<void> {
    const { node_threshold, supernodes } = this.saved.view;
    const asked = `graphs/${this.saved.graph}/suggestions?node_threshold=${node_threshold}`;
    const found = await get<{ nodes: number[]; likeness: number }[]>(asked);
    const taken = new Set(supernodes.flatMap((s) => s.members));
    const free = found
      .map((s) => ({ ...s, nodes: s.nodes.filter((n) => !taken.has(n) && this.net().at.has(n)) }))
      .filter((s) => s.nodes.length > 1);
    const lines = free.slice(0, MOST_SUGGESTED).map((s) => this.suggestion(s.nodes, s.likeness));
    const none = h("p", { class: "soft" }, "None: no two features shown are similar enough.");
    fill(this.suggested, lines.length ? h("ul", { class: "list" }, ...lines) : none);
  }

  private suggestion(nodes: number[], likeness: number): HTMLElement {
    const names = nodes.map((n) => this.net().label(this.net().at.get(n)!));
    const some = [...new Set(names)].slice(0, 3).join("; ");
    const told = `${nodes.length} features: ${some}${names.length > 3 ? " …" : ""}`;
    const line = h("li", {});
    const take = (): void => {
      this.saved.group(this.unused(commonest(names)), nodes);
      line.remove();
      this.hands.redraw();
    };
    fill(
      line,
      button("Add", take),
      button("Cancel", () => line.remove()),
      h("span", { class: "label" }, told),
      h("span", { class: "soft nowrap" }, `similarity ${likeness.toFixed(2)}`),
    );
    return line;
  }
}

function commonest(names: string[]): string {
  const counts = new Map<string, number>();
  for (const n of names) counts.set(n, (counts.get(n) ?? 0) + 1);
  return [...counts].sort((a, b) => b[1] - a[1])[0]![0].slice(0, 60);
}
