// One feature: its labels, top activations, logits, decoder norms, neighbours and clusters.
import { get, job, type Bundle, type Entry, type Feature, type Group, type Histogram, type Near } from "../api";
import { field, fill, form, h, notice, section, type Child } from "../dom";
import { bar, chip, count, heat, name, short, stage, visible } from "../format";
import { examples, labelling, logits, metrics } from "../feature";
import { trail } from "../trail";

const PLACES: Record<string, string> = {
  peak: "at the max",
  before: "just before the max",
  first: "first of consecutive activations",
  last: "last of consecutive activations",
};
const NEAR: Record<string, string> = {
  encoder: "Similar encoders",
  decoder: "Similar decoders",
  coactivation: "Coactivating features",
  upstream: "Strongest upstream",
  downstream: "Strongest downstream",
};

export async function oneFeature(main: HTMLElement, id: string, layer: number, index: number): Promise<void> {
  const [f, bundle, entries] = await Promise.all([
    get<Feature>(`bundles/${id}/features/${layer}/${index}`),
    get<Bundle>(`bundles/${id}`),
    get<Entry[]>("library"),
  ]);
  const run = entries.find((e) => e.kind === "bundle" && e.id === id)?.run;
  document.title = `${name(layer, index)} ${f.label ?? ""}`;
  trail(
    run && h("a", { href: `#/run/${run}` }, entries.find((e) => e.id === run)?.name),
    h("a", { href: `#/bundle/${id}` }, "features"),
    h("span", {}, name(layer, index)),
  );
  const beside = (i: number): Child =>
    i >= 0 &&
    i < bundle.n_features &&
    h("a", { href: `#/bundle/${id}/${layer}/${i}` }, i < index ? `← ${i}` : `${i} →`);
  const groups = await Promise.all(
    f.groups.map(async (g, level) =>
      g < 0 ? null : (await get<Group[]>(`bundles/${id}/groups/${level}?only=${g}`))[0],
    ),
  );
  fill(
    main,
    h(
      "div",
      { class: "row between" },
      h(
        "h1",
        {},
        h("span", { class: "soft" }, `${name(layer, index)} `),
        h("span", { id: "label" }, f.label ?? "no label"),
      ),
      h("span", { class: "row" }, beside(index - 1), beside(index + 1)),
    ),
    labelling(id, f),
    metrics(f),
    h(
      "div",
      { class: "feature" },
      h("div", {}, section("Examples", ...examples(f)), attempt(f, run)),
      h(
        "div",
        {},
        section(
          "Activations",
          bars(f.linear, "Histogram of activations, linear bins"),
          bars(f.log, "Histogram of activations, two bins per octave"),
        ),
        section("Promoted tokens (positive logits)", logits(f.promotes)),
        section("Suppressed tokens (negative logits)", logits(f.suppresses)),
        section("Decoder norm per layer", norms(f.decoder_norms, layer)),
        section("Tokens", ...tokens(f)),
        section("Clusters", groupList(id, f, groups)),
      ),
    ),
    h(
      "div",
      { class: "columns" },
      ...Object.entries(f.neighbours).map(([by, near]) => section(NEAR[by] ?? by, neighbours(id, near))),
    ),
  );
}

function bars(x: Histogram, label: string): HTMLElement {
  const first = Math.max(
    0,
    x.counts.findIndex((c) => c > 0),
  );
  const last = x.counts.findLastIndex((c) => c > 0);
  const most = Math.max(...x.counts, 1);
  if (last < 0) return h("p", { class: "soft" }, "unknown");
  const shown = x.counts.slice(first, last + 1).map((c, i) => {
    const one = h("span", { title: `${short(x.edges[i + first])} to ${short(x.edges[i + 1 + first])}: ${count(c)}` });
    one.style.height = c ? `${Math.max(2, (100 * c) / most)}%` : "0";
    return one;
  });
  return h(
    "figure",
    { class: "histogram" },
    h("div", { class: "bars", role: "img", "aria-label": label }, ...shown),
    h(
      "figcaption",
      { class: "soft" },
      h("span", {}, short(x.edges[first]) || "0"),
      h("span", {}, label.split(", ")[1] ?? ""),
      h("span", {}, short(x.edges[last + 1])),
    ),
  );
}

function norms(values: number[], layer: number): HTMLElement {
  const most = Math.max(...values, 1e-9);
  if (!values.length) return h("p", { class: "soft" }, "unknown");
  const rows = values.map((v, i) =>
    i < layer
      ? null
      : h(
          "tr",
          {},
          h("th", { scope: "row" }, `L${i}`),
          h("td", { class: "number" }, short(v)),
          h("td", {}, bar(v / most)),
        ),
  );
  return h("table", { class: "tight" }, h("tbody", {}, ...rows));
}

function tokens(f: Feature): HTMLElement[] {
  return Object.entries(f.at).map(([place, some]) => {
    const each = some.map((x) => h("span", {}, chip(x.token), h("span", { class: "soft" }, ` ×${count(x.count)}`)));
    return h("div", {}, h("h3", {}, PLACES[place] ?? place), h("p", { class: "chips" }, ...each));
  });
}

function groupList(id: string, f: Feature, groups: (Group | null | undefined)[]): HTMLElement {
  const lines = groups.map(
    (g, level) =>
      g &&
      h(
        "li",
        {},
        h(
          "a",
          { href: `#/bundle/${id}/map?level=${level}&group=${f.groups[level]}` },
          g.label || `cluster ${g.number}`,
        ),
        h("span", { class: "soft" }, ` ${count(g.size)} features`),
      ),
  );
  return lines.some(Boolean) ? h("ul", { class: "entries" }, ...lines) : h("p", { class: "soft" }, "in no cluster");
}

function neighbours(id: string, near: Near[]): HTMLElement {
  if (!near.length) return h("p", { class: "soft" }, "none");
  const lines = near.map((x) =>
    h(
      "li",
      {},
      h("a", { href: `#/bundle/${id}/${x.layer}/${x.index}` }, name(x.layer, x.index)),
      h("span", { class: "number" }, short(x.value)),
      h("span", { class: "label" }, x.label ?? ""),
    ),
  );
  return h("ol", { class: "list" }, ...lines);
}

function attempt(f: Feature, run: string | null | undefined): HTMLElement {
  if (!run)
    return section(
      "Try it",
      h("p", { class: "soft" }, "The bundle is not in a run's folder, so its transcoder is unknown."),
    );
  const text = h("textarea", { rows: 2, cols: 44, placeholder: "your own text" });
  const seen = h("div", { role: "status" });
  async function look(): Promise<void> {
    if (!text.value) return notice("type some text first");
    try {
      const { result } = await job<{ tokens: string[]; activations: number[] }>(
        "activations",
        { run, text: text.value, layer: f.layer, index: f.index },
        stage(seen),
      );
      const tokens = result.tokens.map((t, i) =>
        heat(t, (result.activations[i] ?? 0) / (f.max || 1), `${visible(t)} ${short(result.activations[i])}`),
      );
      fill(
        seen,
        h("p", { class: "tried" }, ...tokens),
        h(
          "p",
          { class: "soft" },
          `max here ${short(Math.max(...result.activations))}, max on the bundle's text ${short(f.max)}`,
        ),
      );
    } catch (error) {
      fill(seen);
      notice((error as Error).message);
    }
  }
  return section(
    "Try it",
    form(() => void look(), field("Text", text), h("button", { class: "main" }, "Test activation")),
    seen,
  );
}
