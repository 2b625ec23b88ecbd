// The pinned subgraph: boxes for pinned nodes and supernodes, to be dragged, with the sums of their direct edges.
import type { Supernode } from "../api";
import { fill, h, s } from "../dom";
import { signed } from "../format";
import type { SavedView } from "./saved";
import type { Net } from "./net";

interface Box {
  key: string;
  title: string;
  members: number[];
  supernode: Supernode | null;
  x: number;
  y: number;
}
interface Link {
  from: Box;
  to: Box;
  weight: number;
}
export interface Circuit {
  boxes: Box[];
  links: Link[];
  width: number;
  height: number;
}

const [BOX_WIDE, BOX_TALL, STEP, MARGIN] = [148, 34, 66, 16];

// Boxes and the sums of the edges between them.
export function circuit(net: Net, saved: SavedView, width: number): Circuit {
  const { view } = saved;
  const grouped = new Set(view.supernodes.flatMap((x) => x.members));
  const here = (some: number[]): number[] => some.map((n) => net.at.get(n)).filter((i): i is number => i !== undefined);
  const boxes: Box[] = [];
  const add = (key: string, title: string, members: number[], supernode: Supernode | null): void => {
    if (members.length) boxes.push({ key, title, members, supernode, x: 0, y: 0 });
  };
  for (const one of view.supernodes) add(`s ${one.name}`, one.name, here(one.members), one);
  for (const n of view.pins) if (!grouped.has(n)) for (const i of here([n])) add(String(n), net.label(i), [i], null);
  const height = place(net, boxes, view.places, width);
  const of = new Map(boxes.flatMap((b) => b.members.map((m): [number, Box] => [m, b])));
  const sums = new Map<string, Link>();
  for (const to of boxes)
    for (const m of to.members)
      for (const { other, weight } of net.inputs(m)) {
        const from = of.get(other);
        if (!from || from === to) continue;
        const key = `${from.key}\n${to.key}`;
        const link = sums.get(key) ?? { from, to, weight: 0 };
        link.weight += weight;
        sums.set(key, link);
      }
  const links = [...sums.values()].sort((a, b) => Math.abs(a.weight) - Math.abs(b.weight));
  return { boxes, links, width, height };
}

// Earlier layers below, earlier tokens to the left; what a person has moved stays where it was put.
function place(net: Net, boxes: Box[], places: Record<string, [number, number]>, width: number): number {
  const { layer, position } = net.graph.nodes;
  const mean = (some: number[], of: number[]): number => some.reduce((sum, i) => sum + of[i]!, 0) / some.length;
  const free = boxes.filter((b) => !places[b.key]);
  const depths = [...new Set(free.map((b) => Math.round(mean(b.members, layer))))].sort((a, b) => b - a);
  let y = MARGIN;
  for (const depth of depths) {
    const row = free.filter((b) => Math.round(mean(b.members, layer)) === depth);
    row.sort((a, b) => mean(a.members, position) - mean(b.members, position));
    const perRow = Math.max(1, Math.floor((width - MARGIN) / (BOX_WIDE + MARGIN)));
    for (let start = 0; start < row.length; start += perRow) {
      const some = row.slice(start, start + perRow);
      const gap = (width - some.length * BOX_WIDE) / (some.length + 1);
      some.forEach((b, i) => ([b.x, b.y] = [gap + i * (BOX_WIDE + gap), y]));
      y += STEP;
    }
  }
  for (const b of boxes) {
    const moved = places[b.key];
    if (moved) [b.x, b.y] = [Math.min(moved[0], Math.max(0, width - BOX_WIDE)), moved[1]];
  }
  return Math.max(120, ...boxes.map((b) => b.y + BOX_TALL + MARGIN));
}

export interface Hands {
  choose(node: number): void;
  chooseGroup(s: Supernode): void;
  moved(key: string, x: number, y: number): void;
}

export function draw(into: HTMLElement, c: Circuit, chosen: number, hands: Hands): void {
  if (!c.boxes.length) {
    fill(
      into,
      h(
        "p",
        { class: "soft empty" },
        "Nothing is pinned yet. Click a node above, then Pin to subgraph (or press p), or add a suggested supernode.",
      ),
    );
    return;
  }
  const most = Math.max(...c.links.map((l) => Math.abs(l.weight)), 1e-9);
  const lines = c.links.map((l) => {
    const [x0, y0, x1, y1] = [
      l.from.x + BOX_WIDE / 2,
      l.from.y + BOX_TALL / 2,
      l.to.x + BOX_WIDE / 2,
      l.to.y + BOX_TALL / 2,
    ];
    const share = Math.abs(l.weight) / most;
    const path = s("path", {
      class: l.weight < 0 ? "edge cold" : "edge",
      d: `M${x0},${y0} C${x0},${(y0 + y1) / 2} ${x1},${(y0 + y1) / 2} ${x1},${y1}`,
      "stroke-width": (0.8 + 4 * share).toFixed(2),
      "stroke-opacity": (0.25 + 0.65 * share).toFixed(2),
    });
    path.append(s("title", {}, `${l.from.title} → ${l.to.title}: ${signed(l.weight)}`));
    return path;
  });
  const picture = s(
    "svg",
    {
      width: c.width,
      height: c.height,
      viewBox: `0 0 ${c.width} ${c.height}`,
      class: "circuit",
      role: "group",
      "aria-label": "Pinned subgraph",
    },
    ...lines,
  );
  for (const b of c.boxes) picture.append(box(b, c, into, chosen, hands));
  fill(into, picture);
}

function box(b: Box, c: Circuit, into: HTMLElement, chosen: number, hands: Hands): SVGElement {
  const title = b.supernode ? `${b.title} (${b.members.length})` : b.title;
  const shown = title.length > 22 ? `${title.slice(0, 21)}…` : title;
  const classes = ["box", b.supernode ? "super" : "", b.members.includes(chosen) ? "chosen" : ""]
    .filter(Boolean)
    .join(" ");
  const work = (): void => (b.supernode ? hands.chooseGroup(b.supernode) : hands.choose(b.members[0]!));
  const g = s(
    "g",
    {
      class: classes,
      transform: `translate(${b.x},${b.y})`,
      tabindex: 0,
      role: "button",
      "aria-label": title,
      "data-box": b.title,
    },
    s("rect", { width: BOX_WIDE, height: BOX_TALL, rx: 7 }),
    s("text", { x: BOX_WIDE / 2, y: BOX_TALL / 2 + 4, "text-anchor": "middle" }, shown),
    s("title", {}, title),
  );
  let start: [number, number] | null = null;
  let moved = false;
  g.addEventListener("pointerdown", (event) => {
    const e = event as PointerEvent;
    start = [e.clientX - b.x, e.clientY - b.y];
    moved = false;
    g.setPointerCapture(e.pointerId);
  });
  g.addEventListener("pointermove", (event) => {
    const e = event as PointerEvent;
    if (!start) return;
    const [x, y] = [e.clientX - start[0], e.clientY - start[1]];
    if (Math.abs(x - b.x) + Math.abs(y - b.y) > 3) moved = true;
    if (!moved) return;
    b.x = Math.max(0, Math.min(c.width - BOX_WIDE, x));
    b.y = Math.max(0, y);
    g.setAttribute("transform", `translate(${b.x},${b.y})`);
  });
  g.addEventListener("pointerup", () => {
    start = null;
    if (moved) hands.moved(b.key, b.x, b.y);
    else work();
  });
  g.addEventListener("keydown", (event) => {
    const e = event as KeyboardEvent;
    const steps: Record<string, [number, number]> = {
      ArrowLeft: [-12, 0],
      ArrowRight: [12, 0],
      ArrowUp: [0, -12],
      ArrowDown: [0, 12],
    };
    const step = steps[e.key];
    if (step) {
      hands.moved(b.key, Math.max(0, b.x + step[0]), Math.max(0, b.y + step[1]));
      into.querySelector<SVGElement>(`[data-box="${CSS.escape(b.title)}"]`)?.focus();
    } else if (e.key === "Enter" || e.key === " ") work();
    else return;
    e.preventDefault();
    e.stopPropagation();
  });
  return g;
}
