// One feature: what it is called and why, when it fires, what it writes, what is near it.
import {
  get,
  job,
  send,
  type Bundle,
  type Entry,
  type Example,
  type Feature,
  type GivenLabel,
  type Group,
  type Histogram,
  type Logit,
  type Near,
} from "./api";
import { field, fill, form, h, notice, section, type Child } from "./dom";
import { bar, chip, count, heat, name, percent, short, stage, visible } from "./format";
import { trail } from "./main";

const AROUND = 24;
const PLACES: Record<string, string> = {
  peak: "at the peak",
  before: "just before it",
  first: "first of the run",
  last: "last of the run",
};
const NEAR: Record<string, string> = {
  encoder: "Like encoders",
  decoder: "Like decoders",
  coactivation: "Fire together",
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
    figures(f),
    h(
      "div",
      { class: "feature" },
      h("div", {}, section("Examples", ...examples(f)), attempt(f, run)),
      h(
        "div",
        {},
        section(
          "Activations",
          bars(f.linear, "Histogram of activations, evenly divided"),
          bars(f.log, "Histogram of activations, two bins an octave"),
        ),
        section("Promotes", logits(f.promotes)),
        section("Suppresses", logits(f.suppresses)),
        section("Writes to", norms(f.decoder_norms, layer)),
        section("Tokens", ...tokens(f)),
        section("Groups", groupList(id, f, groups)),
      ),
    ),
    h(
      "div",
      { class: "columns" },
      ...Object.entries(f.neighbours).map(([by, near]) => section(NEAR[by] ?? by, neighbours(id, near))),
    ),
  );
}

export function labelling(id: string, f: Feature, told: (label: string | null) => void = () => undefined): HTMLElement {
  const at = `bundles/${id}/features/${f.layer}/${f.index}`;
  let mine = f.labels.find((x) => x.source === "person")?.label ?? "";
  const input = h("input", {
    value: mine,
    placeholder: "your label",
    size: 36,
    maxlength: 500,
    "aria-label": "Your label",
  });
  const from = h("span", { class: "soft" }, source(f.label_from));
  const pin = h(
    "button",
    {
      type: "button",
      "aria-pressed": String(f.pinned),
      click: async () => {
        const on = pin.getAttribute("aria-pressed") !== "true";
        await send("PUT", `${at}/pin`, { pinned: on });
        pin.setAttribute("aria-pressed", String(on));
      },
    },
    "Pin",
  );
  const save = async (): Promise<void> => {
    const said = await send<{ label: string | null; label_from: string | null }>("PUT", `${at}/label`, {
      label: input.value,
      over: mine,
    });
    mine = input.value.trim();
    const shown = document.getElementById("label");
    if (shown) shown.textContent = said.label ?? "no label";
    from.textContent = source(said.label_from);
    told(said.label);
    notice(mine ? "label kept" : "label taken away");
  };
  const r = f.rule;
  const scored =
    r &&
    r.auroc !== null &&
    `rule by ${r.kind}: AUROC ${r.auroc.toFixed(3)}, precision ${(r.precision ?? 0).toFixed(2)}, recall ${(r.recall ?? 0).toFixed(2)}, on text that did not choose it`;
  return h(
    "div",
    { class: "labelling" },
    form(() => void save(), input, h("button", {}, "Keep label"), pin, from),
    scored && h("p", { class: "soft" }, scored),
    ...f.labels.filter((x) => x.source !== "person").map(given),
  );
}

const source = (from: string | null): string =>
  from === null ? "no rule names it" : from === "person" ? "labelled by you" : `labelled by ${from}`;

function given(x: GivenLabel): HTMLElement {
  return h(
    "p",
    {},
    h("b", {}, x.label),
    h("span", { class: "soft" }, ` by ${x.source}${x.scored ? ` (${x.scored})` : ""}`),
    x.explanation && h("span", {}, `: ${x.explanation}`),
  );
}

export function figures(f: Feature): HTMLElement {
  if (!f.count && !f.max) return h("p", { class: "soft" }, `Dead: it fired on none of ${count(f.n_tokens)} tokens.`);
  const sources = Object.entries(f.density_by_source);
  const parts = [
    `fires on ${percent(f.density, 3)} of tokens${f.n_tokens ? ` (${count(f.count)} of ${count(f.n_tokens)})` : ""}`,
    f.mean !== null && f.count ? `${short(f.mean)} on average` : "",
    `${short(f.max)} at most`,
    sources.length > 1 ? sources.map(([n, d]) => `${n} ${percent(d, 3)}`).join(", ") : "",
  ];
  return h("p", { class: "soft" }, parts.filter(Boolean).join(" · "));
}

export function bars(x: Histogram, label: string): HTMLElement {
  const first = Math.max(
    0,
    x.counts.findIndex((c) => c > 0),
  );
  const last = x.counts.findLastIndex((c) => c > 0);
  const most = Math.max(...x.counts, 1);
  if (last < 0) return h("p", { class: "soft" }, "not known");
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

export function logits(side: Logit[], most = 12): HTMLElement {
  if (!side.length) return h("p", { class: "soft" }, "not known");
  const peak = Math.max(...side.map((x) => Math.abs(x.value ?? 0)), 1e-9);
  const rows = side
    .slice(0, most)
    .map((x) =>
      h(
        "tr",
        {},
        h("td", {}, chip(x.token)),
        h("td", { class: "number" }, short(x.value)),
        h("td", {}, bar((x.value ?? 0) / peak, (x.value ?? 0) < 0)),
        h("td", { class: "number soft" }, x.z === null ? "" : `z ${x.z.toFixed(1)}`),
      ),
    );
  return h("table", { class: "tight" }, h("tbody", {}, ...rows));
}

function norms(values: number[], layer: number): HTMLElement {
  const most = Math.max(...values, 1e-9);
  if (!values.length) return h("p", { class: "soft" }, "not known");
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
        h("a", { href: `#/bundle/${id}/map?level=${level}&group=${f.groups[level]}` }, g.label || `group ${g.number}`),
        h("span", { class: "soft" }, ` ${count(g.size)} features`),
      ),
  );
  return lines.some(Boolean) ? h("ul", { class: "entries" }, ...lines) : h("p", { class: "soft" }, "in none");
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

export function examples(f: Feature, most = Infinity): HTMLElement[] {
  const bins = [...new Set(f.examples.map((e) => e.bin))];
  if (!bins.length) return [h("p", { class: "soft" }, "none: it did not fire on the text that was looked at")];
  return bins.map((bin, i) => {
    const some = f.examples.filter((e) => e.bin === bin).slice(0, most);
    const title =
      bin === 0
        ? "Highest"
        : `Quantile ${bin} of ${f.quantile_edges.length - 1}: ${short(f.quantile_edges[bin - 1])} to ${short(f.quantile_edges[bin])}`;
    return h(
      "details",
      { open: i < 5 },
      h("summary", {}, title, h("span", { class: "soft" }, ` · ${some.length}`)),
      ...some.map((e) => shown(e, f.max)),
    );
  });
}

function shown(e: Example, most: number): HTMLElement {
  const from = Math.max(0, e.peak - AROUND);
  const to = Math.min(e.tokens.length, e.peak + AROUND + 1);
  const tokens = e.tokens.slice(from, to).map((t, i) => {
    const value = e.activations[from + i] ?? 0;
    return heat(t, value / (most || 1), `${JSON.stringify(t)} ${short(value)}`, from + i === e.peak);
  });
  return h(
    "p",
    { class: "example" },
    h("span", { class: "value", title: e.source }, short(e.value)),
    h("span", {}, from ? "…" : "", ...tokens, to < e.tokens.length ? "…" : ""),
  );
}

function attempt(f: Feature, run: string | null | undefined): HTMLElement {
  if (!run)
    return section(
      "Try it",
      h("p", { class: "soft" }, "The bundle does not lie in a run, so its transcoder is not known."),
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
          `highest here ${short(Math.max(...result.activations))}, on the bundle's text ${short(f.max)}`,
        ),
      );
    } catch (error) {
      fill(seen);
      notice((error as Error).message);
    }
  }
  return section(
    "Try it",
    form(() => void look(), field("Text", text), h("button", { class: "main" }, "How active is it?")),
    seen,
  );
}
