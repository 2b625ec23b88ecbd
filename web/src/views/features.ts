// The list of features: sorted, filtered, searched by words, or by what fires on a text.
import { get, job, type Bundle, type Entry, type Found } from "../api";
import { button, field, fill, form, h, later, notice, section } from "../dom";
import { chip, count, name, percent, short, stage, visible } from "../format";
import { trail } from "../trail";

const COLUMNS = [
  ["rank", "feature", ""],
  ["label", "label", ""],
  ["auroc", "AUROC", "number"],
  ["density", "density", "number"],
  ["max", "max", "number"],
] as const;
const PAGE = 100;
const MOST_FOUND = 200;

interface Asked {
  q: string;
  sort: string;
  descending: boolean;
  layer: string;
  least: string;
  most: string;
  auroc: string;
  reach: string;
  offset: number;
}

export async function featureList(main: HTMLElement, id: string, query: URLSearchParams): Promise<void> {
  const [bundle, entries] = await Promise.all([get<Bundle>(`bundles/${id}`), get<Entry[]>("library")]);
  const run = entries.find((e) => e.kind === "bundle" && e.id === id)?.run;
  document.title = `features · ${bundle.scan || bundle.clt}`;
  trail(
    run && h("a", { href: `#/run/${run}` }, entries.find((e) => e.id === run)?.name),
    h("span", {}, "features"),
    bundle.levels > 0 && h("a", { href: `#/bundle/${id}/map` }, "feature map"),
  );
  const text = (key: string): string => query.get(key) ?? "";
  const asked: Asked = {
    q: text("q"),
    sort: query.get("sort") ?? "rank",
    descending: query.get("descending") === "true",
    layer: text("layer"),
    least: text("least"),
    most: text("most"),
    auroc: text("auroc"),
    reach: text("reach"),
    offset: Number(query.get("offset") ?? 0),
  };
  type Box = "layer" | "least" | "most" | "auroc" | "reach";
  const change =
    (key: Box) =>
    (event: Event): void => {
      asked[key] = (event.target as HTMLInputElement).value;
      asked.offset = 0;
      void load();
    };
  const number = (key: Box, most: number, step: string | number): HTMLElement =>
    h("input", { type: "number", min: 0, max: most, step, value: asked[key], class: "narrow", change: change(key) });
  const search = h("input", {
    type: "search",
    value: asked.q,
    placeholder: "word · wid* · fires:def · promotes:self · label:return",
    class: "search",
    input: later(() => {
      asked.q = search.value;
      asked.offset = 0;
      void load();
    }),
  });
  const layers = Array.from({ length: bundle.n_layers }, (_, i) =>
    h("option", { value: i, selected: asked.layer === String(i) }, i),
  );
  const sortBy = (key: string): void => {
    asked.descending = asked.sort === key ? !asked.descending : key !== "rank" && key !== "label";
    asked.sort = key;
    asked.offset = 0;
    void load();
  };
  const headers = COLUMNS.map(([key, title, kind]) =>
    h(
      "th",
      { scope: "col", class: kind },
      button(title, () => sortBy(key)),
    ),
  );
  const head = h(
    "tr",
    {},
    ...headers,
    h("th", { scope: "col" }, "fires on"),
    h("th", { scope: "col", class: "wide", title: "Tokens with the largest positive logits" }, "promoted tokens"),
  );
  const turn = (by: number) => (): void => {
    asked.offset = Math.max(0, asked.offset + by);
    void load();
  };
  const [before, after] = [button("← Previous", turn(-PAGE)), button("Next →", turn(PAGE))];
  const body = h("tbody", {});
  const said = h("p", { class: "soft", role: "status" });
  const sources = bundle.text.map((t) => t.name).join(", ");
  fill(
    main,
    h("h1", {}, `Features of ${bundle.scan || bundle.clt || id}`),
    h(
      "p",
      { class: "soft" },
      `${count(bundle.n_layers * bundle.n_features)} features of ${bundle.n_layers} layers`,
      bundle.n_tokens ? `, measured on ${count(bundle.n_tokens)} held-out tokens of ${sources}` : "",
      bundle.imported ? `, imported from ${bundle.imported}` : "",
    ),
    byPrompt(id, run),
    section(
      "All features",
      h(
        "div",
        { class: "row" },
        field("Search", search),
        field("Layer", h("select", { change: change("layer") }, h("option", { value: "" }, "all"), ...layers)),
        field("Density from", number("least", 1, "any")),
        field("to", number("most", 1, "any")),
        field("AUROC from", number("auroc", 1, "any")),
        field("Layers reached from", number("reach", bundle.n_layers, 1)),
      ),
      said,
      h(
        "div",
        { class: "scroll", tabindex: 0, role: "region", "aria-label": "List of features" },
        h("table", { class: "features" }, h("thead", {}, head), body),
      ),
      h("div", { class: "row" }, before, after),
    ),
  );

  async function load(): Promise<void> {
    const set = Object.entries(asked).filter(([, v]) => v !== "" && v !== false && v !== 0 && v !== "rank");
    const address = new URLSearchParams(set.map(([k, v]) => [k, String(v)])).toString();
    history.replaceState(null, "", `#/bundle/${id}${address ? `?${address}` : ""}`);
    const words = asked.q.trim();
    const found = words
      ? await get<Found[]>(`bundles/${id}/search?limit=${MOST_FOUND}&q=${encodeURIComponent(words)}`)
      : await page();
    if (words !== asked.q.trim()) return;
    headers.forEach((th, i) => {
      if (COLUMNS[i]![0] === asked.sort && !words)
        th.setAttribute("aria-sort", asked.descending ? "descending" : "ascending");
      else th.removeAttribute("aria-sort");
    });
    const listed = words ? found.filter(passes) : found;
    fill(body, ...listed.map(line));
    const more = found.length === MOST_FOUND ? " or more" : "";
    said.textContent = words
      ? listed.length
        ? `${listed.length}${more} match`
        : "none match; try fewer words, or a prefix, as wid*"
      : listed.length
        ? `${count(asked.offset + 1)} to ${count(asked.offset + listed.length)}`
        : "none; loosen the filters";
    before.disabled = asked.offset === 0 || !!words;
    after.disabled = found.length < PAGE || !!words;
  }

  function page(): Promise<Found[]> {
    const filters = new URLSearchParams({
      sort: asked.sort,
      descending: String(asked.descending),
      limit: String(PAGE),
      offset: String(asked.offset),
    });
    if (asked.layer) filters.append("filter", `layer:${asked.layer}:${asked.layer}`);
    if (asked.least || asked.most) filters.append("filter", `density:${asked.least}:${asked.most}`);
    if (asked.auroc) filters.append("filter", `auroc:${asked.auroc}:`);
    if (asked.reach) filters.append("filter", `reach:${asked.reach}:`);
    return get<Found[]>(`bundles/${id}/features?${filters}`);
  }

  const passes = (f: Found): boolean =>
    (!asked.layer || f.layer === Number(asked.layer)) &&
    f.density >= Number(asked.least || 0) &&
    f.density <= Number(asked.most || 1) &&
    (f.auroc ?? 0) >= Number(asked.auroc || 0);

  function line(f: Found): HTMLElement {
    const chips = (some: string[]): HTMLElement => h("span", { class: "chips" }, ...some.slice(0, 4).map(chip));
    return h(
      "tr",
      {},
      h("td", {}, h("a", { href: `#/bundle/${id}/${f.layer}/${f.index}` }, name(f.layer, f.index))),
      h("td", { class: "label" }, f.label ?? h("span", { class: "soft" }, f.max || f.density ? "no label" : "dead")),
      h("td", { class: "number" }, f.auroc === null ? "" : f.auroc.toFixed(3)),
      h("td", { class: "number" }, percent(f.density, 3)),
      h("td", { class: "number" }, short(f.max)),
      h("td", {}, chips(f.fires)),
      h("td", { class: "wide" }, chips(f.promotes)),
    );
  }
  await load();
}

function byPrompt(id: string, run: string | null | undefined): HTMLElement {
  if (!run)
    return section(
      "By prompt",
      h("p", { class: "soft" }, "This bundle is not in a run's folder, so its transcoder is unknown."),
    );
  const text = h("textarea", {
    rows: 2,
    cols: 60,
    placeholder: "type text to see which features are active at which token",
  });
  const seen = h("div", { role: "status" });
  async function look(): Promise<void> {
    if (!text.value) return notice("type some text first");
    type Answer = { tokens: string[]; active: [number, number, number][][] };
    try {
      const { result } = await job<Answer>("activations", { run, text: text.value, top: 10 }, stage(seen));
      const lines = result.active.flat().map(([layer, index]) => `${layer}/${index}`);
      const labels = await get<Record<string, string>>(
        `bundles/${id}/labels?${new URLSearchParams([...new Set(lines)].slice(0, 500).map((f) => ["of", f]))}`,
      );
      const list = h("ol", { class: "list" });
      const tokens = result.tokens.map((t, i) =>
        button(visible(t), () => pick(i), {
          class: "token",
          "aria-pressed": "false",
          title: `${result.active[i]!.length} features`,
        }),
      );
      const pick = (at: number): void => {
        tokens.forEach((t, i) => t.setAttribute("aria-pressed", String(i === at)));
        const lines = result.active[at]!.map(([l, n, v]) =>
          h(
            "li",
            {},
            h("a", { href: `#/bundle/${id}/${l}/${n}` }, name(l, n)),
            h("span", { class: "number" }, short(v)),
            h("span", { class: "label" }, labels[`${l}/${n}`] ?? ""),
          ),
        );
        fill(list, ...(lines.length ? lines : [h("li", { class: "soft" }, "no active feature at this token")]));
      };
      fill(seen, h("p", { class: "tokens" }, ...tokens), list);
      pick(result.tokens.length - 1);
    } catch (error) {
      fill(seen);
      notice((error as Error).message);
    }
  }
  return section(
    "By prompt",
    form(() => void look(), field("Text", text), h("button", { class: "main" }, "Which features are active?")),
    seen,
  );
}
