// The graph view: columns of tokens and rows of layers, the chosen node beside them, the pinned subgraph below.
import { get, send, type Entry, type Graph, type Interval } from "../api";
import { button, field, fill, form, download, h, later, notice, section } from "../dom";
import { count, percent, short } from "../format";
import { trail } from "../trail";
import { newGraph } from "../prompt";
import { Changes } from "../graph/change";
import { circuit, draw as drawCircuit } from "../graph/circuit";
import { FIRST_NAME, SavedView } from "../graph/saved";
import { layout, nearest, type Layout } from "../graph/layout";
import { Net } from "../graph/net";
import { coloursOf, paintBase, paintChosen } from "../graph/paint";
import { savePng, saveSvg, type Picture } from "../graph/pictures";
import { nodePane } from "../graph/side";
import { Supernodes } from "../graph/supernodes";

const STATES = { saved: "saved", saving: "saving …", conflict: "", lost: "" };

export async function graphView(main: HTMLElement, id: string, query: URLSearchParams): Promise<() => void> {
  const entries = await get<Entry[]>("library");
  const entry = entries.find((e) => e.kind === "graph" && e.id === id);
  if (!entry) throw new Error(`there is no graph ${id} here; reload the list`);
  const title = entry.name
    .split("/")
    .at(-1)!
    .replace(/\.json$/, "");
  document.title = `${title} · graph`;
  trail(
    entry.run && h("a", { href: `#/run/${entry.run}` }, entries.find((e) => e.id === entry.run)?.name),
    h("span", {}, title),
  );

  const state = h("span", { class: "soft", role: "status" });
  const clash = h("div", { class: "clash", role: "alert" });
  const saved = new SavedView(id, query.get("view") ?? FIRST_NAME, (now, message) => {
    state.textContent = STATES[now];
    if (now === "conflict" || now === "lost") showClash(message ?? "", now === "conflict");
    else fill(clash);
    if (now === "saved") listViews();
  });
  const isSaved = await saved.open(saved.name);

  let net = new Net(await load());
  if (!isSaved) {
    saved.view.pins = [...net.graph.first.pins];
    saved.view.supernodes = net.graph.first.supernodes.map((s) => ({ ...s }));
    for (const s of saved.view.supernodes)
      for (const n of s.members) if (!saved.view.pins.includes(n)) saved.view.pins.push(n);
  }
  let chosen = net.at.get(Number(query.get("node") ?? -1)) ?? -1;
  let hovered = -1;
  let where: Layout;

  // -- what is on the page ------------------------------------------------------------------------------------------
  const base = h("canvas", {});
  const over = h("canvas", {
    class: "over",
    tabindex: 0,
    role: "img",
    "aria-label": "Attribution graph. Arrow keys go from node to node, p pins the chosen one, Escape deselects it.",
  });
  const tip = h("div", { class: "tip", hidden: true });
  const stage = h("div", { class: "stage" }, base, over, tip);
  const side = h("aside", { class: "side", "aria-label": "Chosen node" });
  const below = h("div", {});
  const scores = h("p", { class: "soft" });
  const pinnedScores = h("p", { class: "soft", role: "status" });
  const slider = (label: string, key: "node_threshold" | "edge_threshold"): HTMLElement => {
    const value = h("output", {}, saved.view[key].toFixed(2));
    const input = h("input", { type: "range", min: 0.1, max: 1, step: 0.01, value: saved.view[key] });
    input.disabled = net.graph.imported;
    input.addEventListener("input", () => {
      saved.view[key] = input.valueAsNumber;
      value.textContent = input.valueAsNumber.toFixed(2);
      reload();
    });
    return field(label, input, h("span", { class: "slider" }, input, value));
  };
  const errors = h("input", { type: "checkbox", checked: saved.view.errors });
  errors.addEventListener("change", () => {
    saved.view.errors = errors.checked;
    saved.changed();
    redraw();
  });
  const views = h("select", { "aria-label": "View" });
  views.addEventListener("change", () => (location.hash = `#/graph/${id}?view=${encodeURIComponent(views.value)}`));
  const viewName = h("input", { size: 12, maxlength: 80, placeholder: "new name", "aria-label": "Name of the view" });
  const saveForm = form(() => void saveAs(viewName.value), viewName, h("button", {}, "Save as"));
  const others = entries.filter((e) => e.kind === "graph" && e.id !== id);
  const compare = h(
    "select",
    { "aria-label": "Compare with another graph" },
    h("option", { value: "" }, "Compare with …"),
    ...others.map((e) => h("option", { value: e.id }, e.name)),
  );
  compare.addEventListener("change", () => compare.value && (location.hash = `#/compare/${id}/${compare.value}`));
  const find = h("input", {
    type: "search",
    placeholder: "label, token or L3/120",
    list: "nodes",
    "aria-label": "Find a node",
  });
  find.addEventListener("change", () => findNode(find.value));
  const changes = new Changes(() => net, saved, !net.graph.imported && entry.run !== null);
  const groups = new Supernodes(() => net, saved, {
    choose,
    hover,
    redraw,
    controls: (members) => changes.controls(members),
  });
  const facts = h("p", { class: "soft" });
  const runs = entries.filter((e) => e.kind === "run");
  const exported = h(
    "div",
    { class: "row" },
    button("JSON", () => void exportJson()),
    button("SVG", () => saveSvg(picture(), title)),
    button("PNG", () => savePng(picture(), title)),
  );
  fill(
    main,
    h("div", { class: "row between" }, h("h1", {}, title), h("div", { class: "row" }, state, views, saveForm)),
    h("p", { class: "prompt" }, net.graph.header.prompt),
    clash,
    h(
      "div",
      { class: "row" },
      slider("Nodes", "node_threshold"),
      slider("Edges", "edge_threshold"),
      h("label", { class: "check" }, errors, "errors"),
      find,
      others.length > 0 && compare,
      exported,
    ),
    h(
      "div",
      { class: "graph" },
      h(
        "div",
        {},
        stage,
        h("div", { class: "row between" }, facts, legend()),
        section("Pinned subgraph", scores, pinnedScores, groups.grouping, h("div", { class: "scroll" }, below)),
        section(
          "Suggested supernodes",
          h("p", { class: "soft" }, "Features at neighbouring tokens with similar edges."),
          button("Suggest", () => void groups.suggest()),
          groups.suggested,
        ),
        section("Another prompt", newGraph(runs, net.graph.header.prompt)),
      ),
      h("div", {}, side, section("Interventions", changes.element)),
    ),
  );

  // -- loading ------------------------------------------------------------------------------------------------------
  async function load(): Promise<Graph> {
    const { node_threshold, edge_threshold, pins } = saved.view;
    const asked = new URLSearchParams({
      node_threshold: String(node_threshold),
      edge_threshold: String(edge_threshold),
    });
    for (const n of pins) asked.append("wanted", String(n));
    return get<Graph>(`graphs/${id}?${asked}`);
  }
  const reload = later(async () => {
    const held = chosen >= 0 ? net.graph.nodes.id[chosen]! : -1;
    net = new Net(await load());
    chosen = net.at.get(held) ?? -1;
    hovered = -1;
    saved.changed();
    redraw();
    choose(chosen);
  }, 120);

  // -- drawing ------------------------------------------------------------------------------------------------------
  const pinned = (): Set<number> =>
    new Set(saved.view.pins.map((n) => net.at.get(n)).filter((i): i is number => i !== undefined));
  const picture = (): Picture => ({ net, layout: where, colours: coloursOf(stage), pinned: pinned(), chosen });

  function size(canvas: HTMLCanvasElement): CanvasRenderingContext2D {
    canvas.width = where.width * devicePixelRatio;
    canvas.height = where.height * devicePixelRatio;
    canvas.style.width = `${where.width}px`;
    canvas.style.height = `${where.height}px`;
    const pen = canvas.getContext("2d")!;
    pen.scale(devicePixelRatio, devicePixelRatio);
    return pen;
  }

  function redraw(): void {
    const height = Math.min(720, Math.max(470, 34 * (net.graph.header.n_layers + 2)));
    where = layout(net, stage.clientWidth - 2, height, saved.view.errors);
    paintBase(size(base), net, where, coloursOf(stage), pinned());
    size(over);
    paintOver();
    const { nodes, edges } = net.graph;
    const features = nodes.kind.filter((k) => k === "feature").length;
    const shown = `${count(net.n)} nodes, ${count(edges.weight.length)} edges shown`;
    facts.textContent = `${count(features)} of ${count(net.graph.n_features)} features, ${shown}`;
    stage.dataset.nodes = String(net.n);
    drawBelow();
  }

  let frame = 0;
  function paintOver(): void {
    cancelAnimationFrame(frame);
    frame = requestAnimationFrame(() => {
      const pen = over.getContext("2d")!;
      pen.clearRect(0, 0, where.width, where.height);
      const shown = hovered >= 0 ? hovered : chosen;
      over.classList.toggle("dim", shown >= 0);
      stage.dataset.at = chosen >= 0 ? `${where.xs[chosen]} ${where.ys[chosen]}` : "";
      if (shown >= 0) paintChosen(pen, net, where, coloursOf(stage), shown);
    });
  }

  function drawBelow(): void {
    const c = circuit(net, saved, Math.max(320, stage.clientWidth - 36));
    drawCircuit(below, c, chosen, {
      choose,
      chooseGroup: (s) => groups.pane(side, s),
      moved: (key, x, y) => {
        saved.view.places[key] = [x, y];
        saved.changed();
        drawBelow();
      },
    });
    groups.show();
    pinnedScore();
  }

  // -- choosing and pinning -----------------------------------------------------------------------------------------
  function choose(i: number): void {
    chosen = i;
    address();
    paintOver();
    drawBelow();
    if (i < 0) {
      fill(
        side,
        h(
          "p",
          { class: "soft" },
          "Point at a node to see its edges; click it to see what it is. The arrow keys go from node to node.",
        ),
      );
      return;
    }
    nodePane(side, net, i, {
      choose,
      hover,
      pin: pinNode,
      isPinned: (n) => saved.view.pins.includes(net.graph.nodes.id[n]!),
      controls: (n) => changes.controls([net.graph.nodes.id[n]!]),
      labelled: (layer, index, label) => {
        const { nodes } = net.graph;
        nodes.layer.forEach((l, n) => {
          if (l === layer && nodes.index[n] === index) nodes.label[n] = label;
        });
        drawBelow();
      },
    });
  }

  function hover(i: number): void {
    if (i === hovered) return;
    hovered = i;
    tip.hidden = i < 0;
    if (i >= 0) {
      const { name, activation, influence } = net.graph.nodes;
      const label = net.label(i);
      const more = [
        label !== name[i] ? name[i] : "",
        activation[i] === null ? "" : short(activation[i]),
        influence[i]! > 0 ? percent(influence[i]!, 2) : "",
      ];
      fill(tip, h("b", {}, label), ` ${more.filter(Boolean).join(" · ")}`);
      const right = where.xs[i]! - stage.scrollLeft > stage.clientWidth / 2;
      tip.style.left = right ? "" : `${where.xs[i]! + 12}px`;
      tip.style.right = right ? `${stage.clientWidth - where.xs[i]! + 12}px` : "";
      tip.style.top = `${Math.max(2, where.ys[i]! - 34)}px`;
    }
    paintOver();
  }

  function pinNode(i: number): void {
    saved.pin(net.graph.nodes.id[i]!);
    redraw();
    choose(i);
  }

  function findNode(text: string): void {
    const words = text.trim().toLowerCase();
    const names = net.graph.nodes.name;
    const found = names.findIndex(
      (n, i) => where.shown[i] && (n.toLowerCase().includes(words) || net.label(i).toLowerCase().includes(words)),
    );
    if (!words || found < 0) notice(`no node shown has “${text}”; raise the Nodes threshold to see more`);
    else choose(found);
  }

  // The nearest node in a direction.
  function step(dx: number, dy: number): void {
    if (chosen < 0) return choose(net.graph.nodes.kind.indexOf("target"));
    const [x, y] = [where.xs[chosen]!, where.ys[chosen]!];
    let [best, least] = [-1, Infinity];
    for (let i = 0; i < net.n; i++) {
      const [along, across] = [
        (where.xs[i]! - x) * dx + (where.ys[i]! - y) * dy,
        Math.abs((where.xs[i]! - x) * dy) + Math.abs((where.ys[i]! - y) * dx),
      ];
      if (!where.shown[i] || along < 1 || (dx !== 0 && across > 1)) continue;
      const far = along + 2 * across;
      if (far < least) [best, least] = [i, far];
    }
    if (best >= 0) choose(best);
  }

  const place = (event: MouseEvent): number => {
    const box = over.getBoundingClientRect();
    return nearest(where, event.clientX - box.left, event.clientY - box.top);
  };
  over.addEventListener("pointermove", (e) => hover(place(e)));
  over.addEventListener("pointerleave", () => hover(-1));
  over.addEventListener("click", (e) => choose(place(e)));
  over.addEventListener("dblclick", (e) => {
    const i = place(e);
    if (i >= 0) pinNode(i);
  });
  const keys: Record<string, () => void> = {
    ArrowLeft: () => step(-1, 0),
    ArrowRight: () => step(1, 0),
    ArrowUp: () => step(0, -1),
    ArrowDown: () => step(0, 1),
    Escape: () => choose(-1),
    p: () => chosen >= 0 && pinNode(chosen),
  };
  over.addEventListener("keydown", (e) => {
    const work = keys[e.key];
    if (!work || e.ctrlKey || e.metaKey) return;
    e.preventDefault();
    work();
  });

  // -- scores -------------------------------------------------------------------------------------------------------
  const told = (x: Interval): string =>
    x.high - x.low > 0.005 ? `${percent(x.value)} (${percent(x.low)} to ${percent(x.high)})` : percent(x.value);
  function showScores(): void {
    const s = net.graph.scores;
    scores.textContent = s
      ? `Whole graph: replacement ${told(s.replacement)}, completeness ${told(s.completeness)}.`
      : "The graph was imported pruned, so its scores cannot be computed.";
  }
  const pinnedScore = later(async () => {
    const features = saved.view.pins.filter((n) => n < net.graph.n_features);
    if (!features.length || net.graph.imported) {
      pinnedScores.textContent = "";
      return;
    }
    const s = await send<{ replacement: Interval; completeness: Interval }>("POST", `graphs/${id}/scores`, {
      nodes: features,
    });
    const alone = `${features.length} pinned ${features.length > 1 ? "features" : "feature"} alone`;
    pinnedScores.textContent = `${alone}: replacement ${told(s.replacement)}, completeness ${told(s.completeness)}`;
  }, 250);

  // -- saving -------------------------------------------------------------------------------------------------------
  function listViews(): void {
    const names = saved.names.includes(saved.name) ? saved.names : [saved.name, ...saved.names];
    fill(views, ...names.map((n) => h("option", { value: n, selected: n === saved.name }, n)));
  }
  function address(): void {
    const asked = new URLSearchParams();
    if (saved.name !== FIRST_NAME) asked.set("view", saved.name);
    if (chosen >= 0) asked.set("node", String(net.graph.nodes.id[chosen]));
    const text = asked.toString();
    history.replaceState(null, "", `#/graph/${id}${text ? `?${text}` : ""}`);
  }
  async function saveAs(name: string): Promise<void> {
    if (!name.trim()) return notice("give the view a name first");
    await saved.as(name.trim());
    viewName.value = "";
    listViews();
    address();
    fill(clash);
    notice(`saved as “${name.trim()}”; the address opens it`);
  }
  function showClash(message: string, conflict: boolean): void {
    const theirs = button("Show theirs", () => {
      fill(clash);
      void saved.open(saved.name).then(reload);
    });
    fill(
      clash,
      h("p", {}, message),
      conflict ? theirs : button("Try again", () => saved.changed()),
      conflict &&
        button(
          "Save mine as a copy",
          () => void saveAs(`${saved.name} ${new Date().toISOString().slice(11, 19).replaceAll(":", ".")}`),
        ),
    );
  }
  async function exportJson(): Promise<void> {
    const { node_threshold, edge_threshold } = saved.view;
    const asked = new URLSearchParams({
      node_threshold: String(node_threshold),
      edge_threshold: String(edge_threshold),
      view: saved.name,
    });
    download(
      new Blob([JSON.stringify(await get(`graphs/${id}/export?${asked}`))], { type: "application/json" }),
      `${title}.json`,
    );
  }

  listViews();
  showScores();
  redraw();
  choose(chosen);
  const resized = later(redraw, 100);
  window.addEventListener("resize", resized);
  const scheme = window.matchMedia("(prefers-color-scheme: dark)");
  scheme.addEventListener("change", redraw);
  return () => {
    window.removeEventListener("resize", resized);
    scheme.removeEventListener("change", redraw);
    cancelAnimationFrame(frame);
  };
}

function legend(): HTMLElement {
  return h(
    "p",
    { class: "soft legend" },
    h("span", { class: "warm" }, "— raises"),
    h("span", { class: "cold" }, "— lowers"),
    "● feature  ◇ error  □ token, target",
  );
}
