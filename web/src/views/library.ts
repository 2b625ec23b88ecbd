// The library: runs, features and graphs below the folders that are served.
import { get, type Entry } from "../api";
import { button, fill, h, section } from "../dom";
import { take } from "../drop";
import { newGraph } from "../prompt";

const KINDS = [
  ["run", "Runs", "No runs yet. Train one with: crosslayer quickstart"],
  [
    "bundle",
    "Features",
    "No features yet. Build them with: crosslayer features build --clt RUN --text TEXT -o RUN/features",
  ],
  ["graph", "Graphs", "No graphs yet. Trace a prompt, or drop a graph file on this page."],
] as const;

export async function library(main: HTMLElement): Promise<void> {
  const entries = await get<Entry[]>("library");
  document.title = "crosslayer";
  const list = (kind: Entry["kind"], empty: string): HTMLElement => {
    const some = entries.filter((e) => e.kind === kind);
    if (!some.length) return h("p", { class: "soft" }, empty);
    return h(
      "ul",
      { class: "entries" },
      ...some.map((e) => h("li", {}, h("a", { href: `#/${kind}/${e.id}` }, e.name))),
    );
  };
  const file = h("input", {
    type: "file",
    accept: ".json,application/json",
    "aria-label": "Graph file to import",
    class: "hidden",
    change: () => void take(file.files),
  });
  const runs = entries.filter((e) => e.kind === "run");
  fill(
    main,
    h("h1", {}, "Library"),
    h("div", { class: "columns" }, ...KINDS.map(([kind, title, empty]) => section(title, list(kind, empty)))),
    section("Trace a prompt", newGraph(runs)),
    h(
      "section",
      { class: "card drop" },
      h("h2", {}, "Import a graph"),
      h(
        "p",
        { class: "soft" },
        "Drop a graph file here: circuit-tracer's, Neuronpedia's, or one exported by this page.",
      ),
      button("Choose a file", () => file.click()),
      file,
    ),
  );
}
