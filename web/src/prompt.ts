// A new graph from a prompt.
import { job, type Entry } from "./api";
import { field, fill, form, h, notice } from "./dom";
import { stage } from "./format";

export function newGraph(runs: Entry[], prompt = ""): HTMLElement {
  if (!runs.length) return h("p", { class: "soft" }, "Tracing needs a run's transcoder; there is no run here.");
  const run = h("select", {}, ...runs.map((r) => h("option", { value: r.id }, r.name)));
  const text = h("textarea", { rows: 2, cols: 44, required: true, placeholder: "text whose next token is explained" });
  const called = h("input", { required: true, maxlength: 80, size: 16, placeholder: "a name for the graph" });
  const target = h("input", { size: 16, placeholder: "most likely tokens", "aria-describedby": "target-help" });
  const said = h("div", { role: "status" });
  text.value = prompt;
  const trace = async (): Promise<void> => {
    const targets = target.value ? [target.value] : [];
    const asked = { run: run.value, prompt: text.value, name: called.value, targets };
    try {
      const { taken } = await job<unknown, { graph: string }>("trace", asked, stage(said));
      location.hash = `#/graph/${taken.graph}`;
    } catch (error) {
      fill(said);
      notice((error as Error).message);
    }
  };
  return h(
    "div",
    {},
    form(
      () => void trace(),
      field("Prompt", text),
      field("Name", called),
      field("Target", target),
      runs.length > 1 && field("Run", run),
      h("button", { class: "main" }, "Trace"),
    ),
    h(
      "p",
      { class: "soft", id: "target-help" },
      "A target is a token with its leading space (“ width”), a difference of two tokens (“ a-minus- b”), or a " +
        "feature (“L3/120”). Add “@POSITION” for another position.",
    ),
    said,
  );
}
