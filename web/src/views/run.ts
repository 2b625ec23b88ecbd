// A run: config, metrics, curves while it trains, the model card.
import { get, type Entry } from "../api";
import { fill, h, s, section } from "../dom";
import { bar, count, percent, short } from "../format";
import { trail } from "../trail";
import { newGraph } from "../prompt";

type Line = Record<string, number | number[] | null | Record<string, unknown>>;
interface Run {
  manifest: { state: string; config: Record<string, unknown>; step?: number; train_s?: number };
  evaluation: Record<string, unknown> | null;
  card: string | null;
}
const CURVES = [
  ["loss", "Loss"],
  ["fvu", "FVU"],
  ["l0", "L0 per token"],
  ["dead_share", "Dead features (share)"],
] as const;
const EVERY_MS = 2000;

export async function runView(main: HTMLElement, id: string): Promise<() => void> {
  const [first, entries] = await Promise.all([get<Run>(`runs/${id}`), get<Entry[]>("library")]);
  let run = first;
  const mine = entries.filter((e) => e.run === id);
  const entry = mine.find((e) => e.kind === "run")!;
  document.title = `${entry.name} · crosslayer`;
  trail(h("span", {}, entry.name));
  const state = h("p", { role: "status" });
  const metrics = h("div", {});
  const curves = h("div", { class: "columns" });
  const settings = h(
    "table",
    {},
    h(
      "tbody",
      {},
      ...Object.entries(run.manifest.config).map(([k, v]) =>
        h("tr", {}, h("th", { scope: "row" }, k), h("td", {}, v === null ? "none" : JSON.stringify(v))),
      ),
    ),
  );
  const links = mine
    .filter((e) => e.kind !== "run")
    .map((e) => h("li", {}, h("a", { href: `#/${e.kind}/${e.id}` }, e.kind === "bundle" ? "features" : e.name)));
  fill(
    main,
    h("h1", {}, entry.name),
    state,
    h(
      "div",
      { class: "columns" },
      section(
        "Features and graphs",
        links.length ? h("ul", { class: "entries" }, ...links) : h("p", { class: "soft" }, "None yet."),
      ),
    ),
    metrics,
    section("Training", curves),
    section("Trace a prompt", newGraph([entry])),
    h("details", { class: "card" }, h("summary", {}, "Settings"), settings),
    run.card &&
      h(
        "details",
        { class: "card" },
        h("summary", {}, "Model card"),
        h("pre", { class: "text", tabindex: 0 }, run.card),
      ),
  );
  const lines: Line[] = [];
  let next = 0;
  let timer = 0;
  function told(): void {
    const { state: now, step, train_s } = run.manifest;
    state.textContent = [
      now,
      step ? `step ${count(step)}` : "",
      train_s ? `${count(Math.round(train_s))} s of training` : "",
    ]
      .filter(Boolean)
      .join(" · ");
    if (run.evaluation) fill(metrics, table(run.evaluation));
  }
  async function more(): Promise<void> {
    for (;;) {
      const log = await get<{ lines: Line[]; next: number; restarted: boolean }>(`runs/${id}/log?after=${next}`);
      if (log.restarted) lines.length = 0;
      lines.push(...log.lines);
      next = log.next;
      if (!log.lines.length) break;
    }
    const by = (key: string): [number, number][] =>
      lines.filter((l) => key in l).map((l) => [Number(l.tokens ?? l.step ?? 0), Number(l[key] ?? NaN)]);
    const layers = lines.filter((l) => Array.isArray(l.fvu_L));
    const depth = layers.length ? (layers[0]!.fvu_L as number[]).length : 0;
    const perLayer = Array.from({ length: depth }, (_, i) =>
      layers.map((l): [number, number] => [Number(l.tokens), (l.fvu_L as number[])[i]!]),
    );
    fill(
      curves,
      ...CURVES.map(([key, title]) => curve(title, [by(key)])),
      depth > 0 && curve("FVU per layer, the last darkest", perLayer),
    );
    if (run.manifest.state === "training") {
      run = await get<Run>(`runs/${id}`);
      timer = window.setTimeout(
        () => void more().catch(() => (timer = window.setTimeout(() => void more(), EVERY_MS))),
        EVERY_MS,
      );
    }
    told();
  }
  await more();
  return () => window.clearTimeout(timer);
}

function table(e: Record<string, unknown>): HTMLElement {
  const r = (e.replacement ?? {}) as Record<string, number>;
  const known = (x: unknown, how: (x: number) => string): string => (typeof x === "number" ? how(x) : "not measured");
  const rows: [string, string][] = [
    ["FVU", known(e.fvu, short)],
    ["L0 per token", `${known(e.l0, short)} (${known(e.l0_per_layer, short)} per layer)`],
    ["dead features", known(e.dead_share, percent)],
    ["loss recovered", known(r.loss_recovered, percent)],
    ["top-1 agreement", known(r.top1_agreement, percent)],
    ["KL(host ‖ replacement)", known(r.kl, (x) => `${short(x)} nats`)],
    ["held-out tokens", known(e.n_tokens, count)],
  ];
  const column = (key: string): number[] => (Array.isArray(e[key]) ? (e[key] as number[]) : []);
  const [fvus, l0s, deads] = [column("fvu_L"), column("l0_L"), column("dead_L")];
  const number = (text: string): HTMLElement => h("td", { class: "number" }, text);
  const layers = fvus.map((v, i) =>
    h(
      "tr",
      {},
      h("th", { scope: "row" }, i),
      number(short(v)),
      h("td", {}, bar(v)),
      number(short(l0s[i])),
      number(percent(deads[i] ?? 0)),
    ),
  );
  const head = [
    ["layer", ""],
    ["FVU", "number"],
    ["", ""],
    ["L0", "number"],
    ["dead", "number"],
  ] as const;
  return h(
    "div",
    { class: "columns" },
    section(
      "Metrics",
      h("table", {}, h("tbody", {}, ...rows.map(([k, v]) => h("tr", {}, h("th", { scope: "row" }, k), number(v))))),
    ),
    section(
      "Per layer",
      h(
        "table",
        {},
        h(
          "thead",
          {},
          h("tr", {}, ...head.map(([t, c]) => (t ? h("th", { scope: "col", class: c }, t) : h("td", {})))),
        ),
        h("tbody", {}, ...layers),
      ),
    ),
  );
}

const [WIDE, TALL, LEFT, BELOW, ABOVE] = [340, 150, 44, 22, 10];

function curve(title: string, curves: [number, number][][]): HTMLElement {
  const good = curves.map((points) => points.filter(([, y]) => Number.isFinite(y)));
  const ys = good
    .flat()
    .map(([, y]) => y)
    .sort((a, b) => a - b);
  // The first steps of a run would press all others to the floor.
  const [low, high] = [ys[0] ?? 0, ys[Math.floor(0.98 * (ys.length - 1))] ?? 1];
  const last = Math.max(1, ...good.map((points) => points.at(-1)?.[0] ?? 1));
  const at = ([x, y]: [number, number]): string => {
    const up = (Math.min(y, high) - low) / (high - low || 1);
    const [across, down] = [LEFT + (x / last) * (WIDE - LEFT - 8), TALL - BELOW - up * (TALL - BELOW - ABOVE)];
    return `${across.toFixed(1)},${down.toFixed(1)}`;
  };
  const one = good.length === 1 ? good[0]! : [];
  const said = one.length
    ? `from ${short(one[0]![1])} to ${short(one.at(-1)![1])}`
    : ys.length
      ? `${short(low)} to ${short(high)}`
      : "nothing yet";
  const lines = good.map((points, i) => {
    const line = s("polyline", { class: "curve", points: points.map(at).join(" ") });
    if (good.length > 1) line.style.opacity = String(0.25 + (0.75 * i) / (good.length - 1));
    return line;
  });
  const picture = s(
    "svg",
    { viewBox: `0 0 ${WIDE} ${TALL}`, role: "img", "aria-label": `${title}: ${said}` },
    s("line", { class: "axis", x1: LEFT, y1: TALL - BELOW, x2: WIDE - 8, y2: TALL - BELOW }),
    s("line", { class: "axis", x1: LEFT, y1: ABOVE, x2: WIDE - 8, y2: ABOVE }),
    ...lines,
    s("text", { x: LEFT - 5, y: ABOVE + 4, "text-anchor": "end" }, short(high)),
    s("text", { x: LEFT - 5, y: TALL - BELOW + 4, "text-anchor": "end" }, short(low)),
    s("text", { x: WIDE - 8, y: TALL - 6, "text-anchor": "end" }, `${short(last)} tokens`),
  );
  return h("figure", {}, h("figcaption", {}, h("b", {}, title), h("span", { class: "soft" }, ` ${said}`)), picture);
}
