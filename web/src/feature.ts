// What is shown of a feature both in its own view and beside a graph: labels, metrics, logits, examples.
import { send, type Example, type Feature, type GivenLabel, type Logit } from "./api";
import { form, h, notice } from "./dom";
import { bar, chip, count, heat, percent, short } from "./format";

const AROUND = 24;

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
    notice(mine ? "label saved" : "label removed");
  };
  const r = f.rule;
  const scored =
    r &&
    r.auroc !== null &&
    `rule by ${r.kind}: AUROC ${r.auroc.toFixed(3)}, precision ${(r.precision ?? 0).toFixed(2)}, ` +
      `recall ${(r.recall ?? 0).toFixed(2)}, on held-out text`;
  return h(
    "div",
    { class: "labelling" },
    form(() => void save(), input, h("button", {}, "Save label"), pin, from),
    scored && h("p", { class: "soft" }, scored),
    ...f.labels.filter((x) => x.source !== "person").map(given),
  );
}

const source = (from: string | null): string =>
  from === null ? "no label" : from === "person" ? "labelled by you" : `labelled by ${from}`;

function given(x: GivenLabel): HTMLElement {
  return h(
    "p",
    {},
    h("b", {}, x.label),
    h("span", { class: "soft" }, ` autointerp label by ${x.source}${x.scored ? ` (${x.scored})` : ""}`),
    x.explanation && h("span", {}, `: ${x.explanation}`),
  );
}

export function metrics(f: Feature): HTMLElement {
  if (!f.count && !f.max) return h("p", { class: "soft" }, `Dead: no activation on ${count(f.n_tokens)} tokens.`);
  const sources = Object.entries(f.density_by_source);
  const parts = [
    `fires on ${percent(f.density, 3)} of tokens${f.n_tokens ? ` (${count(f.count)} of ${count(f.n_tokens)})` : ""}`,
    f.mean !== null && f.count ? `mean ${short(f.mean)}` : "",
    `max ${short(f.max)}`,
    sources.length > 1 ? sources.map(([n, d]) => `${n} ${percent(d, 3)}`).join(", ") : "",
  ];
  return h("p", { class: "soft" }, parts.filter(Boolean).join(" · "));
}

export function logits(side: Logit[], most = 12): HTMLElement {
  if (!side.length) return h("p", { class: "soft" }, "unknown");
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

export function examples(f: Feature, most = Infinity): HTMLElement[] {
  const bins = [...new Set(f.examples.map((e) => e.bin))];
  if (!bins.length) return [h("p", { class: "soft" }, "none: no activation on the bundle's text")];
  return bins.map((bin, i) => {
    const some = f.examples.filter((e) => e.bin === bin).slice(0, most);
    const [from, to] = [f.quantile_edges[bin - 1], f.quantile_edges[bin]];
    const title =
      bin === 0
        ? "Top activations"
        : `Quantile ${bin} of ${f.quantile_edges.length - 1}: ${short(from)} to ${short(to)}`;
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
