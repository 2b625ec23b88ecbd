// Graph files that are dropped on the page, whatever it shows, or chosen.
import { send } from "./api";
import { notice } from "./dom";

export async function take(files: FileList | null | undefined): Promise<void> {
  for (const one of files ?? []) {
    const stem = one.name.replace(/\.json$/, "").slice(0, 80) || "graph";
    const text = await one.text();
    try {
      const { id } = await send<{ id: string }>("POST", `graphs?name=${encodeURIComponent(stem)}`, text);
      location.hash = `#/graph/${id}`;
    } catch (error) {
      const said = notJson(text) ?? (error as Error).message;
      notice(said.startsWith(stem) ? said : `${one.name}: ${said}`);
    }
  }
}

// The server says of such a file only where it broke off.
function notJson(text: string): string | null {
  try {
    const said: unknown = JSON.parse(text);
    if (typeof said === "object" && !Array.isArray(said) && said) return null;
  } catch {
    // said below
  }
  return "it is not a complete JSON object; download or export it again";
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
