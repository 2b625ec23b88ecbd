// Where nodes are drawn: a column for each token, a row for each layer, tokens below and targets above.
import type { Net } from "./net";

export interface Layout {
  width: number;
  height: number;
  xs: Float32Array;
  ys: Float32Array;
  // Nodes that are drawn: all, or all but errors.
  shown: Uint8Array;
  columns: { left: number; right: number }[];
  rows: { y: number; name: string }[];
}

export const LEFT = 46;
const [RIGHT, TOP, BELOW] = [14, 30, 64];
// Between nodes of a cell at most and at best at least; between columns; the narrowest column; between lines of a cell.
const [WIDEST, GOOD, GAP, LEAST_COLUMN, LINE] = [15, 8, 4, 30, 8];
const GOOD_TARGETS = 13;

export function layout(net: Net, width: number, height: number, errors: boolean): Layout {
  const { kind, layer, position, influence } = net.graph.nodes;
  const nLayers = net.graph.header.n_layers;
  const nColumns = net.graph.header.token_strings.length;
  const cells = new Map<number, number[]>();
  const shown = new Uint8Array(net.n);
  const row = (i: number): number => (kind[i] === "token" ? 0 : kind[i] === "target" ? nLayers + 1 : layer[i]! + 1);
  for (let i = 0; i < net.n; i++) {
    if (kind[i] === "error" && !errors) continue;
    shown[i] = 1;
    const key = position[i]! * (nLayers + 2) + row(i);
    const cell = cells.get(key);
    if (cell) cell.push(i);
    else cells.set(key, [i]);
  }
  const pitch = Math.max(16, (height - TOP - BELOW) / (nLayers + 1));
  const mostLines = Math.max(1, Math.floor((pitch - 4) / LINE));
  const columns = columnsOf(cells, nColumns, nLayers + 2, mostLines, width);
  const tall = TOP + BELOW + pitch * (nLayers + 1);
  const y = (r: number): number => tall - BELOW - r * pitch;
  const xs = new Float32Array(net.n);
  const ys = new Float32Array(net.n);
  for (const [key, cell] of cells) {
    const { left, right } = columns[Math.floor(key / (nLayers + 2))]!;
    cell.sort((a, b) => influence[b]! - influence[a]! || a - b);
    // In one line if it fits, in several if not, and closer together only then.
    const isTarget = key % (nLayers + 2) === nLayers + 1;
    const room = Math.max(1, Math.floor((right - left - 8) / (isTarget ? GOOD_TARGETS : GOOD)) + 1);
    const lines = isTarget ? 1 : Math.min(mostLines, Math.ceil(cell.length / room));
    const perLine = Math.ceil(cell.length / lines);
    const step = Math.min(WIDEST, (right - left - 8) / Math.max(1, perLine - 1));
    cell.forEach((i, place) => {
      const [line, across] = [Math.floor(place / perLine), place % perLine];
      const inLine = Math.min(perLine, cell.length - line * perLine);
      xs[i] = (left + right) / 2 + (across - (inLine - 1) / 2) * step;
      ys[i] = y(key % (nLayers + 2)) - (line - (lines - 1) / 2) * LINE;
    });
  }
  const rows = Array.from({ length: nLayers + 2 }, (_, r) => ({
    y: y(r),
    name: r === 0 ? "token" : r === nLayers + 1 ? "target" : `L${r - 1}`,
  }));
  const wide = columns.at(-1)?.right ?? 0;
  return { width: Math.max(width, wide + RIGHT), height: tall, xs, ys, shown, columns, rows };
}

// Columns as wide as their fullest cell needs, shrunk or stretched to fit, but never too narrow for their token.
function columnsOf(
  cells: Map<number, number[]>,
  nColumns: number,
  nRows: number,
  lines: number,
  width: number,
): Layout["columns"] {
  const need = new Float64Array(nColumns).fill(LEAST_COLUMN);
  for (const [key, cell] of cells) {
    const column = Math.floor(key / nRows);
    const isTarget = key % nRows === nRows - 1;
    const wide = isTarget ? cell.length * GOOD_TARGETS : Math.ceil(cell.length / lines) * GOOD;
    need[column] = Math.max(need[column]!, wide + 10);
  }
  const space = width - LEFT - RIGHT - GAP * (nColumns - 1);
  const total = need.reduce((a, b) => a + b, 0);
  const slack = total - LEAST_COLUMN * nColumns;
  const shrunk = slack > 0 ? Math.min(1, Math.max(0, (space - LEAST_COLUMN * nColumns) / slack)) : 1;
  const stretched = Math.max(1, space / total);
  let x = LEFT;
  return Array.from(need, (n) => {
    const left = x;
    const right = left + (LEAST_COLUMN + (n - LEAST_COLUMN) * shrunk) * (shrunk < 1 ? 1 : stretched);
    x = right + GAP;
    return { left, right };
  });
}

// The node nearest to a place, or -1 for none near.
export function nearest(l: Layout, x: number, y: number): number {
  let [best, least] = [-1, 9 ** 2];
  for (let i = 0; i < l.xs.length; i++) {
    if (!l.shown[i]) continue;
    const far = (l.xs[i]! - x) ** 2 + (l.ys[i]! - y) ** 2;
    if (far < least) [best, least] = [i, far];
  }
  return best;
}
