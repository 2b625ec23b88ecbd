// Graph files that are dropped on the page, whatever it shows, or chosen.
import { send } from "./api";
import { notice } from "./dom";

export async function take(files: FileList | null | undefined): Promise<void> {
  for (const one of files ?? []) {
    const stem = one.name.replace(/\.json$/, "").slice(0, 80) || "graph";
    try {
      const { id } = await send<{ id: string }>("POST", `graphs?name=${encodeURIComponent(stem)}`, await one.text());
      location.hash = `#/graph/${id}`;
    } catch (error) {
      notice(`${one.name}: ${(error as Error).message}`);
    }
  }
}

export function takeDrops(): void {
  const away = (): void => document.body.classList.remove("dropping");
  document.addEventListener("dragover", (event) => {
    event.preventDefault();
    document.body.classList.add("dropping");
  });
  document.addEventListener("dragleave", away);
  document.addEventListener("drop", (event) => {
    event.preventDefault();
    away();
    void take(event.dataTransfer?.files);
  });
}
