// A graph with its edges to be found from both ends.
import type { Graph } from "../api";

export interface Edge {
  other: number;
  weight: number;
}

export class Net {
  readonly n: number;
  readonly at = new Map<number, number>();
  private readonly into: [Int32Array, Int32Array];
  private readonly outOf: [Int32Array, Int32Array];

  constructor(readonly graph: Graph) {
    this.n = graph.nodes.id.length;
    graph.nodes.id.forEach((id, i) => this.at.set(id, i));
    this.into = grouped(graph.edges.target, this.n);
    this.outOf = grouped(graph.edges.source, this.n);
  }

  inputs(i: number): Edge[] {
    return this.edges(this.into, this.graph.edges.source, i);
  }

  outputs(i: number): Edge[] {
    return this.edges(this.outOf, this.graph.edges.target, i);
  }

  private edges([starts, order]: [Int32Array, Int32Array], others: number[], i: number): Edge[] {
    const some: Edge[] = [];
    for (let k = starts[i]!; k < starts[i + 1]!; k++) {
      const e = order[k]!;
      some.push({ other: others[e]!, weight: this.graph.edges.weight[e]! });
    }
    return some.sort((a, b) => Math.abs(b.weight) - Math.abs(a.weight));
  }

  label(i: number): string {
    const { kind, label, name } = this.graph.nodes;
    return kind[i] === "feature" ? label[i] || name[i]! : name[i]!;
  }
}

// Numbers of edges in order of one of their ends, and where each node's begin.
function grouped(ends: number[], n: number): [Int32Array, Int32Array] {
  const starts = new Int32Array(n + 1);
  for (const end of ends) starts[end + 1]!++;
  for (let i = 0; i < n; i++) starts[i + 1]! += starts[i]!;
  const next = starts.slice();
  const order = new Int32Array(ends.length);
  ends.forEach((end, e) => (order[next[end]!++] = e));
  return [starts, order];
}
