// Draws a graph on any pen that has the canvas' methods: rows and columns, edges, nodes, and what is chosen above them.
import { visible } from "../format";
import { LEFT, type Layout } from "./layout";
import type { Net } from "./net";

const MOST_EDGES = 30_000;

export interface Colours {
  ground: string;
  ink: string;
  soft: string;
  line: string;
  raised: string;
  warm: string;
  cold: string;
  chosen: string;
}

export function coloursOf(element: Element): Colours {
  const style = getComputedStyle(element);
  const of = (name: string): string => style.getPropertyValue(name).trim();
  return {
    ground: of("--ground"),
    ink: of("--ink"),
    soft: of("--soft"),
    line: of("--line"),
    raised: of("--raised"),
    warm: `rgb(${of("--warm")})`,
    cold: of("--cold"),
    chosen: of("--link"),
  };
}

type Pen = CanvasRenderingContext2D;

export function paintBase(pen: Pen, net: Net, l: Layout, c: Colours, pinned: Set<number>): void {
  pen.fillStyle = c.raised;
  pen.fillRect(0, 0, l.width, l.height);
  frame(pen, net, l, c);
  edges(pen, net, l, c);
  for (let i = 0; i < net.n; i++) if (l.shown[i]) node(pen, net, l, i, c.soft, c.raised);
  for (const i of pinned) if (l.shown[i]) ring(pen, l, i, c.chosen, radius(net, i) + 2.5);
}

function frame(pen: Pen, net: Net, l: Layout, c: Colours): void {
  pen.font = "11px system-ui, sans-serif";
  pen.textBaseline = "middle";
  pen.textAlign = "right";
  l.rows.forEach(({ y, name }, r) => {
    pen.fillStyle = c.line;
    pen.globalAlpha = 0.5;
    pen.fillRect(LEFT, Math.round(y), l.width - LEFT, 1);
    pen.globalAlpha = 1;
    pen.fillStyle = c.soft;
    // Every row is named where there is room.
    const every = Math.max(1, Math.ceil((14 * l.rows.length) / l.height));
    if (r % every === 0 || r === l.rows.length - 1) pen.fillText(name, LEFT - 6, y);
  });
  const foot = l.rows[0]!.y + 16;
  l.columns.forEach(({ left, right }, i) => {
    pen.fillStyle = c.ground;
    pen.globalAlpha = 0.55;
    pen.fillRect(left, 8, right - left, foot - 16);
    pen.globalAlpha = 1;
    pen.fillStyle = c.ink;
    const text = visible(net.graph.header.token_strings[i] ?? "");
    const space = right - left;
    if (pen.measureText(text).width < space + 4) {
      pen.textAlign = "center";
      pen.fillText(text, (left + right) / 2, foot);
    } else {
      pen.save();
      pen.translate((left + right) / 2, foot - 6);
      pen.rotate(-0.6);
      pen.textAlign = "right";
      pen.fillText(text.length > 14 ? `${text.slice(0, 13)}…` : text, 4, 6);
      pen.restore();
    }
  });
}

// The strongest edges, faint, in three strengths for each sign.
function edges(pen: Pen, net: Net, l: Layout, c: Colours): void {
  const { source, target, weight } = net.graph.edges;
  const order = weight.length > MOST_EDGES ? strongest(weight, MOST_EDGES) : weight.keys();
  let most = 1e-9;
  for (const w of weight) most = Math.max(most, Math.abs(w));
  const levels: [number, number][][] = [[], [], [], [], [], []];
  for (const e of order) {
    const [a, b] = [source[e]!, target[e]!];
    if (!l.shown[a] || !l.shown[b]) continue;
    const share = Math.sqrt(Math.abs(weight[e]!) / most);
    levels[(share > 0.4 ? 2 : share > 0.15 ? 1 : 0) + (weight[e]! < 0 ? 3 : 0)]!.push([a, b]);
  }
  // Where there are many, they are a ground and no more.
  const crowd = Math.min(1, Math.sqrt(800 / Math.max(1, weight.length)));
  levels.forEach((some, level) => {
    pen.strokeStyle = level < 3 ? c.warm : c.cold;
    pen.globalAlpha = [0.1, 0.22, 0.4][level % 3]! * Math.max(0.25, crowd);
    pen.lineWidth = [0.6, 1, 1.6][level % 3]!;
    pen.beginPath();
    for (const [a, b] of some) line(pen, l, a, b, some.length < 4000);
    pen.stroke();
  });
  pen.globalAlpha = 1;
}

function strongest(weight: number[], n: number): number[] {
  const sorted = Float32Array.from(weight, Math.abs).sort();
  const cut = sorted[sorted.length - n]!;
  const kept: number[] = [];
  for (let e = 0; e < weight.length && kept.length < n; e++) if (Math.abs(weight[e]!) >= cut) kept.push(e);
  return kept;
}

function line(pen: Pen, l: Layout, a: number, b: number, curved: boolean): void {
  const [x0, y0, x1, y1] = [l.xs[a]!, l.ys[a]!, l.xs[b]!, l.ys[b]!];
  pen.moveTo(x0, y0);
  if (curved) pen.bezierCurveTo(x0, (y0 + y1) / 2, x1, (y0 + y1) / 2, x1, y1);
  else pen.lineTo(x1, y1);
}

const radius = (net: Net, i: number): number =>
  net.graph.nodes.kind[i] === "feature" || net.graph.nodes.kind[i] === "error"
    ? 2.6 + 5 * Math.min(1, Math.sqrt(net.graph.nodes.influence[i]!))
    : 5;

function node(pen: Pen, net: Net, l: Layout, i: number, ink: string, ground: string): void {
  const [x, y, r] = [l.xs[i]!, l.ys[i]!, radius(net, i)];
  const kind = net.graph.nodes.kind[i]!;
  pen.lineWidth = 1.2;
  pen.strokeStyle = ink;
  pen.fillStyle = kind === "feature" ? ink : ground;
  pen.beginPath();
  if (kind === "feature") pen.arc(x, y, r, 0, 7);
  else if (kind === "error") {
    pen.moveTo(x, y - r);
    pen.lineTo(x + r, y);
    pen.lineTo(x, y + r);
    pen.lineTo(x - r, y);
    pen.closePath();
  } else pen.rect(x - r, y - r, 2 * r, 2 * r);
  pen.fill();
  pen.stroke();
}

function ring(pen: Pen, l: Layout, i: number, colour: string, r: number): void {
  pen.strokeStyle = colour;
  pen.lineWidth = 2;
  pen.beginPath();
  pen.arc(l.xs[i]!, l.ys[i]!, r, 0, 7);
  pen.stroke();
}

// The edges of one node and the nodes at their ends, over what is painted.
export function paintChosen(pen: Pen, net: Net, l: Layout, c: Colours, i: number): void {
  if (!l.shown[i]) return;
  const some = [
    ...net.inputs(i).map((e) => [e.other, i, e.weight, e.other] as const),
    ...net.outputs(i).map((e) => [i, e.other, e.weight, e.other] as const),
  ].filter(([, , , other]) => l.shown[other]);
  const most = Math.max(...some.map(([, , w]) => Math.abs(w)), 1e-9);
  for (const [a, b, weight] of [...some].reverse()) {
    const share = Math.abs(weight) / most;
    pen.strokeStyle = weight < 0 ? c.cold : c.warm;
    pen.globalAlpha = 0.25 + 0.75 * share;
    pen.lineWidth = 0.7 + 3 * share;
    pen.beginPath();
    line(pen, l, a, b, true);
    pen.stroke();
  }
  pen.globalAlpha = 1;
  for (const [, , weight, other] of some) node(pen, net, l, other, weight < 0 ? c.cold : c.warm, c.raised);
  node(pen, net, l, i, c.ink, c.raised);
  ring(pen, l, i, c.chosen, radius(net, i) + 3);
}

export function paintMarked(pen: Pen, net: Net, l: Layout, c: Colours, some: Iterable<number>): void {
  for (const i of some) if (l.shown[i]) node(pen, net, l, i, c.warm, c.raised);
}
