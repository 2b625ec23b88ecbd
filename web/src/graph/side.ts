// The chosen node: where it stands, its inputs and outputs by weight, and its feature.
import { get, type Feature } from "../api";
import { button, fill, h, type Child } from "../dom";
import { examples, labelling, logits, metrics } from "../feature";
import { bar, percent, short, signed, visible } from "../format";
import type { Edge, Net } from "./net";

const MOST = 40;

export interface SideHands {
  choose(i: number): void;
  hover(i: number): void;
  pin(i: number): void;
  isPinned(i: number): boolean;
  controls(i: number): Child;
  labelled(layer: number, index: number, label: string | null): void;
}

export function nodePane(into: HTMLElement, net: Net, i: number, hands: SideHands): void {
  const { kind, position, activation, influence, name, layer, index } = net.graph.nodes;
  const token = visible(net.graph.header.token_strings[position[i]!] ?? "");
  const facts = [
    `at “${token}” (${position[i]})`,
    activation[i] === null ? "" : `activation ${short(activation[i])}`,
    kind[i] === "feature" || kind[i] === "error" ? `${percent(influence[i]!, 2)} of influence` : "",
  ];
  const pin = button(hands.isPinned(i) ? "Unpin from subgraph" : "Pin to subgraph", () => hands.pin(i), {
    "aria-pressed": String(hands.isPinned(i)),
  });
  const { bundle } = net.graph;
  const feature = h("div", { "aria-live": "polite" });
  fill(
    into,
    h("h2", {}, net.label(i)),
    h(
      "p",
      { class: "soft" },
      [kind[i] === "feature" && net.label(i) !== name[i] ? name[i] : "", ...facts].filter(Boolean).join(" · "),
    ),
    h(
      "div",
      { class: "row" },
      pin,
      kind[i] === "feature" &&
        bundle &&
        h("a", { href: `#/bundle/${bundle}/${layer[i]}/${index[i]}` }, "Open the feature"),
    ),
    hands.controls(i),
    h(
      "div",
      { class: "two" },
      edges("Inputs", net, net.inputs(i), hands),
      edges("Outputs", net, net.outputs(i), hands),
    ),
    feature,
  );
  if (kind[i] === "feature" && bundle) void about(feature, bundle, layer[i]!, index[i]!, hands);
}

function edges(title: string, net: Net, some: Edge[], hands: SideHands): HTMLElement {
  const most = Math.max(...some.map((e) => Math.abs(e.weight)), 1e-9);
  const lines = some.slice(0, MOST).map(({ other, weight }) =>
    h(
      "li",
      { mouseenter: () => hands.hover(other), mouseleave: () => hands.hover(-1) },
      h("span", { class: "number" }, signed(weight)),
      bar(weight / most, weight < 0),
      button(net.label(other), () => hands.choose(other), {
        class: "plain label",
        title: net.graph.nodes.name[other]!,
      }),
    ),
  );
  const rest = some.length > MOST ? h("li", { class: "soft" }, `and ${some.length - MOST} weaker ones`) : null;
  return h(
    "section",
    {},
    h("h3", {}, `${title} `, h("span", { class: "soft" }, some.length)),
    h("ol", { class: "list edges" }, ...lines, rest),
  );
}

async function about(into: HTMLElement, bundle: string, layer: number, index: number, hands: SideHands): Promise<void> {
  try {
    const f = await get<Feature>(`bundles/${bundle}/features/${layer}/${index}`);
    fill(
      into,
      labelling(bundle, f, (label) => hands.labelled(layer, index, label)),
      metrics(f),
      h("h3", {}, "Promoted tokens (positive logits)"),
      logits(f.promotes, 6),
      h("h3", {}, "Examples"),
      ...examples(f, 4).slice(0, 2),
    );
  } catch (error) {
    fill(into, h("p", { class: "error" }, (error as Error).message));
  }
}
