// Interventions: features ablated, scaled or set on the graph's own prompt; the next tokens, and the measured and
// predicted changes of pinned nodes.
import { job } from "../api";
import { button, field, fill, form, h, notice } from "../dom";
import { bar, chip, percent, short, signed, stage } from "../format";
import type { SavedView } from "./saved";
import type { Net } from "./net";

interface Change {
  node: number;
  scale: number | null;
  set: number | null;
}
interface Outcome {
  tokens: { token: string; before: number; after: number }[];
  watched: { node: number; predicted: number; measured: number; activation: number }[];
}

export class Changes {
  readonly element = h("div", {});
  private readonly asked = h("ul", { class: "list" });
  private readonly seen = h("div", { role: "status" });
  private changes: Change[] = [];
  private readonly freeze = h("select", {}, ...["none", "attention", "norms", "both"].map((f) => h("option", {}, f)));

  constructor(
    private readonly net: () => Net,
    private readonly saved: SavedView,
    private readonly possible: boolean,
  ) {
    if (!possible) {
      fill(
        this.element,
        h(
          "p",
          { class: "soft" },
          "The graph's transcoder is not here: interventions cannot run. Trace the prompt with a run of the library.",
        ),
      );
      return;
    }
    const run = form(
      () => void this.run(),
      field("Freeze", this.freeze),
      h("button", { class: "main" }, "Run"),
      button("Clear", () => this.clear()),
    );
    fill(this.element, this.asked, run, this.seen);
    this.show();
  }

  private clear(): void {
    this.changes = [];
    fill(this.seen);
    this.show();
  }

  // What to do with some features, in place of what was to be done with them before.
  controls(members: number[]): HTMLElement | null {
    const features = members.filter((n) => n < this.net().graph.n_features);
    if (!this.possible || !features.length) return null;
    const amount = h("input", {
      type: "number",
      step: "any",
      value: 2,
      class: "narrow",
      "aria-label": "Factor or activation",
    });
    const add = (scale: number | null, set: number | null): void => {
      if (!Number.isFinite(scale ?? set ?? NaN)) return notice("type a number first");
      this.changes = this.changes.filter((c) => !features.includes(c.node));
      this.changes.push(...features.map((node) => ({ node, scale, set })));
      this.show();
      notice("added below; press Run to see what it does");
    };
    return h(
      "div",
      { class: "row" },
      button("Ablate", () => add(0, null)),
      amount,
      button("× Scale", () => add(amount.valueAsNumber, null)),
      button("= Set", () => add(null, amount.valueAsNumber)),
    );
  }

  private show(): void {
    const net = this.net();
    const name = (n: number): string => (net.at.has(n) ? net.label(net.at.get(n)!) : `node ${n}`);
    const how = (c: Change): string =>
      c.scale === 0 ? "ablated" : c.scale !== null ? `× ${short(c.scale)}` : `= ${short(c.set)}`;
    const drop = (c: Change): HTMLElement =>
      button(
        "✕",
        () => {
          this.changes = this.changes.filter((x) => x !== c);
          this.show();
        },
        { "aria-label": `Remove the intervention on ${name(c.node)}` },
      );
    const lines = this.changes.map((c) =>
      h("li", {}, drop(c), h("span", { class: "label" }, name(c.node)), h("b", {}, how(c))),
    );
    fill(
      this.asked,
      ...(lines.length
        ? lines
        : [h("li", { class: "soft" }, "Choose a feature or supernode, then Ablate, Scale or Set.")]),
    );
  }

  private async run(): Promise<void> {
    if (!this.changes.length)
      return notice("there are no interventions yet; choose a feature, then Ablate, Scale or Set");
    const watch = this.saved.view.pins.slice(0, 500);
    const asked = { graph: this.saved.graph, changes: this.changes, watch, freeze: this.freeze.value };
    try {
      fill(this.seen, outcome((await job<Outcome>("intervene", asked, stage(this.seen))).result, this.net()));
    } catch (error) {
      fill(this.seen);
      notice((error as Error).message);
    }
  }
}

function outcome(o: Outcome, net: Net): HTMLElement {
  const most = Math.max(...o.tokens.flatMap((t) => [t.before, t.after]), 1e-9);
  const head = (...names: string[]): HTMLElement =>
    h("thead", {}, h("tr", {}, ...names.map((n, i) => h("th", { scope: "col", class: i ? "number" : "" }, n))));
  const cell = (p: number, cold: boolean): HTMLElement => h("td", { class: "number" }, percent(p), bar(p / most, cold));
  const tokens = o.tokens.map((t) =>
    h("tr", {}, h("td", {}, chip(t.token)), cell(t.before, true), cell(t.after, false)),
  );
  const watched = o.watched.map((w) => {
    const i = net.at.get(w.node);
    return h(
      "tr",
      {},
      h(
        "td",
        { class: "label" },
        i === undefined ? `node ${w.node}` : net.label(i),
        i !== undefined && h("span", { class: "soft" }, ` ${net.graph.nodes.name[i]}`),
      ),
      ...[w.activation, w.predicted, w.measured].map((v, k) => h("td", { class: "number" }, k ? signed(v) : short(v))),
    );
  });
  return h(
    "div",
    {},
    h(
      "table",
      { class: "tight" },
      h("caption", {}, "Next token"),
      head("token", "before", "after"),
      h("tbody", {}, ...tokens),
    ),
    watched.length
      ? h(
          "table",
          { class: "tight" },
          h("caption", {}, "Pinned features: activation change"),
          head("feature", "before", "predicted", "measured"),
          h("tbody", {}, ...watched),
        )
      : h("p", { class: "soft" }, "Pin features to compare measured changes with those that the edges predict."),
  );
}
