// Two graphs side by side, by the features that they share, wherever these stand.
import { get, type Entry, type Graph } from "../api";
import { fill, h, section } from "../dom";
import { count, name, percent } from "../format";
import { layout, type Layout } from "../graph/layout";
import { Net } from "../graph/net";
import { coloursOf, paintBase, paintMarked } from "../graph/paint";
import { trail } from "../trail";

interface Half {
  net: Net;
  canvas: HTMLCanvasElement;
  where: Layout;
  features: Map<string, number[]>;
}

export async function compareView(main: HTMLElement, first: string, second: string): Promise<void> {
  const entries = await get<Entry[]>("library");
  const called = (id: string): string =>
    entries
      .find((e) => e.id === id)
      ?.name.split("/")
      .at(-1)!
      .replace(/\.json$/, "") ?? id;
  const graphs = await Promise.all([first, second].map((id) => get<Graph>(`graphs/${id}`)));
  document.title = `${called(first)} and ${called(second)}`;
  trail(h("a", { href: `#/graph/${first}` }, called(first)), h("a", { href: `#/graph/${second}` }, called(second)));
  const halves: Half[] = graphs.map((graph) => {
    const net = new Net(graph);
    const features = new Map<string, number[]>();
    graph.nodes.kind.forEach((kind, i) => {
      if (kind !== "feature") return;
      const key = `${graph.nodes.layer[i]}/${graph.nodes.index[i]}`;
      features.set(key, [...(features.get(key) ?? []), i]);
    });
    return {
      net,
      canvas: h("canvas", { role: "img", "aria-label": `Graph of ${graph.header.prompt}` }),
      where: layout(net, 100, 100, true),
      features,
    };
  });
  const [a, b] = halves as [Half, Half];
  const total = (half: Half, key: string): number =>
    (half.features.get(key) ?? []).reduce((sum, i) => sum + half.net.graph.nodes.influence[i]!, 0);
  const keys = [...new Set([...a.features.keys(), ...b.features.keys()])];
  const shared = keys.filter((k) => a.features.has(k) && b.features.has(k));
  const only = (mine: Half, other: Half): string[] =>
    keys.filter((k) => mine.features.has(k) && !other.features.has(k));
  const show = (key: string | null): void => halves.forEach((half) => paint(half, key));
  const row = (key: string): HTMLElement => {
    const [layer, index] = key.split("/").map(Number) as [number, number];
    const half = a.features.has(key) ? a : b;
    const i = half.net.graph.nodes;
    const label = i.label[half.features.get(key)![0]!];
    const { bundle } = half.net.graph;
    const link = bundle
      ? h("a", { href: `#/bundle/${bundle}/${layer}/${index}` }, name(layer, index))
      : name(layer, index);
    const share = (x: Half): HTMLElement =>
      h("td", { class: "number" }, x.features.has(key) ? percent(total(x, key), 2) : "—");
    return h(
      "tr",
      { mouseenter: () => show(key), mouseleave: () => show(null), focusin: () => show(key) },
      h("td", {}, link),
      h("td", { class: "label" }, label ?? h("span", { class: "soft" }, "no label")),
      share(a),
      share(b),
    );
  };
  const table = (title: string, some: string[]): HTMLElement => {
    const sorted = some.sort((x, y) => total(a, y) + total(b, y) - total(a, x) - total(b, x)).slice(0, 100);
    const head = h(
      "tr",
      {},
      ...["feature", "label", called(first), called(second)].map((t, i) =>
        h("th", { scope: "col", class: i > 1 ? "number" : "" }, t),
      ),
    );
    return section(
      `${title}: ${count(some.length)}`,
      some.length
        ? h(
            "div",
            { class: "scroll tall", tabindex: 0, role: "region", "aria-label": title },
            h("table", {}, h("thead", {}, head), h("tbody", {}, ...sorted.map(row))),
          )
        : h("p", { class: "soft" }, "none"),
    );
  };
  const sides = halves.map((half, i) =>
    h(
      "section",
      {},
      h("h2", {}, h("a", { href: `#/graph/${[first, second][i]}` }, called([first, second][i]!))),
      h("p", { class: "prompt" }, half.net.graph.header.prompt),
      h("div", { class: "stage" }, half.canvas),
    ),
  );
  fill(
    main,
    h("h1", {}, "Compare graphs"),
    h("div", { class: "pair" }, ...sides),
    table("In both", shared),
    h(
      "div",
      { class: "pair" },
      table(`Only in ${called(first)}`, only(a, b)),
      table(`Only in ${called(second)}`, only(b, a)),
    ),
  );

  function paint(half: Half, key: string | null): void {
    const stage = half.canvas.parentElement!;
    half.where = layout(half.net, stage.clientWidth - 2, 320, true);
    half.canvas.width = half.where.width * devicePixelRatio;
    half.canvas.height = half.where.height * devicePixelRatio;
    half.canvas.style.width = `${half.where.width}px`;
    const pen = half.canvas.getContext("2d")!;
    pen.scale(devicePixelRatio, devicePixelRatio);
    const marked = key === null ? shared.flatMap((k) => half.features.get(k) ?? []) : (half.features.get(key) ?? []);
    const colours = coloursOf(stage);
    paintBase(pen, half.net, half.where, colours, new Set());
    paintMarked(pen, half.net, half.where, colours, marked);
  }
  requestAnimationFrame(() => show(null));
}
