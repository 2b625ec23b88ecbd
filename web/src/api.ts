// What the server answers; the records are those of crosslayer.records and crosslayer.serve.
export interface Entry {
  id: string;
  kind: "run" | "bundle" | "graph";
  name: string;
  run: string | null;
}
export interface Found {
  layer: number;
  index: number;
  label: string | null;
  density: number;
  max: number;
  auroc: number | null;
  fires: string[];
  promotes: string[];
}
export interface Example {
  tokens: string[];
  activations: number[];
  peak: number;
  value: number;
  bin: number;
  source: string;
}
export interface Logit {
  token: string;
  value: number | null;
  z: number | null;
}
export interface Histogram {
  edges: number[];
  counts: number[];
}
export interface Near {
  layer: number;
  index: number;
  value: number;
  label: string | null;
}
export interface GivenLabel {
  source: string;
  label: string;
  explanation: string | null;
  // Its scores as text, empty for none.
  scored: string;
}
export interface Feature {
  layer: number;
  index: number;
  label: string | null;
  label_from: string | null;
  n_tokens: number;
  count: number;
  density: number;
  density_by_source: Record<string, number>;
  rule: { kind: string; precision: number | null; recall: number | null; auroc: number | null } | null;
  mean: number | null;
  min: number;
  max: number;
  linear: Histogram;
  log: Histogram;
  quantile_edges: number[];
  examples: Example[];
  at: Record<string, { token: string; count: number }[]>;
  promotes: Logit[];
  suppresses: Logit[];
  decoder_norms: number[];
  groups: number[];
  neighbours: Record<string, Near[]>;
  pinned: boolean;
  labels: GivenLabel[];
}
export interface Bundle {
  n_layers: number;
  n_features: number;
  n_tokens: number;
  host: string;
  scan: string;
  clt: string;
  levels: number;
  text: { name: string }[];
  imported: string | null;
}
export interface Group {
  level: number;
  number: number;
  size: number;
  label: string;
  fed_by: [number, number][];
}
export interface Interval {
  value: number;
  low: number;
  high: number;
}
export type Kind = "feature" | "error" | "token" | "target";
export interface Graph {
  header: {
    prompt: string;
    tokens: number[];
    token_strings: string[];
    n_layers: number;
    targets: { name: string; probability: number | null; position: number }[];
  };
  scores: { replacement: Interval; completeness: Interval } | null;
  imported: boolean;
  first: Pick<View, "pins" | "supernodes">;
  bundle: string | null;
  n_features: number;
  nodes: {
    id: number[];
    kind: Kind[];
    layer: number[];
    index: (number | null)[];
    position: number[];
    activation: (number | null)[];
    influence: number[];
    name: string[];
    label: (string | null)[];
  };
  edges: { source: number[]; target: number[]; weight: number[] };
}
export interface Supernode {
  name: string;
  members: number[];
}
export interface View {
  pins: number[];
  supernodes: Supernode[];
  places: Record<string, [number, number]>;
  node_threshold: number;
  edge_threshold: number;
  errors: boolean;
}
export interface JobEvent<T> {
  state: "waiting" | "running" | "done" | "failed" | "cancelled";
  stage?: string;
  result?: T;
  error?: string;
}

export class Refused extends Error {
  constructor(
    readonly status: number,
    message: string,
  ) {
    super(message);
  }
}

async function answered(response: Response): Promise<Response> {
  if (response.ok) return response;
  const said = await response.json().catch(() => ({ detail: response.statusText }));
  const details = Array.isArray(said.detail) ? (said.detail as { msg: string; loc: string[] }[]) : [];
  const detail = details.length ? details.map((d) => `${d.loc.at(-1)}: ${d.msg}`).join("; ") : said.detail;
  throw new Refused(response.status, detail || `the server answered ${response.status}`);
}

async function fetched(path: string, options?: RequestInit): Promise<Response> {
  const response = await fetch(`/api/${path}`, options).catch(() => {
    throw new Error("the server cannot be reached; is it still running?");
  });
  return answered(response);
}

export async function get<T>(path: string): Promise<T> {
  return (await fetched(path)).json();
}

export async function bytes(path: string): Promise<ArrayBuffer> {
  return (await fetched(path)).arrayBuffer();
}

export async function send<T>(method: "POST" | "PUT" | "DELETE", path: string, body?: unknown): Promise<T> {
  const options: RequestInit = { method, headers: { "content-type": "application/json" } };
  if (body !== undefined) options.body = typeof body === "string" ? body : JSON.stringify(body);
  return (await fetched(path, options)).json();
}

// Runs a job to its end. `told` is called with each stage and a function that stops the job. Returns the result, and
// the server's answer to the request.
export async function job<T, A = { job: number }>(
  kind: string,
  asked: unknown,
  told: (stage: string, stop: () => void) => void,
): Promise<{ result: T; taken: A & { job: number } }> {
  const taken = await send<A & { job: number }>("POST", `jobs/${kind}`, asked);
  const stop = (): void => void send("DELETE", `jobs/${taken.job}`);
  return new Promise((resolve, reject) => {
    const events = new EventSource(`/api/jobs/${taken.job}/events`);
    events.onmessage = (message) => {
      const event: JobEvent<T> = JSON.parse(message.data);
      if (event.state === "waiting" || event.state === "running") {
        told(event.stage ?? event.state, stop);
        return;
      }
      events.close();
      if (event.state === "done") resolve({ result: event.result as T, taken });
      else reject(new Error(event.error ?? "stopped"));
    };
    events.onerror = () => {
      events.close();
      reject(new Error("the server cannot be reached; is it still running?"));
    };
  });
}
