// A view of a graph: pins, supernodes, places and thresholds, saved on the server under a name at each change.
// A change made elsewhere is never overwritten silently.
import { get, Refused, send, type Supernode, type View } from "../api";
import { later } from "../dom";

export const FIRST_NAME = "default";

export class SavedView {
  view: View = { pins: [], supernodes: [], places: {}, node_threshold: 0.8, edge_threshold: 0.98, errors: true };
  names: string[] = [];
  private revision = "";
  private busy = false;
  private again = false;
  // Of the view; counts its changes.
  private version = 0;

  constructor(
    readonly graph: string,
    public name: string,
    private readonly told: (state: "saved" | "saving" | "conflict" | "lost", message?: string) => void,
  ) {}

  private at(name: string): string {
    return `graphs/${this.graph}/views/${encodeURIComponent(name)}`;
  }

  async open(name: string): Promise<boolean> {
    const { value, revision } = await get<{ value: View | null; revision: string }>(this.at(name));
    this.name = name;
    this.revision = revision;
    if (value) this.view = value;
    this.names = await get<string[]>(`graphs/${this.graph}/views`);
    return value !== null;
  }

  // Under another name, which later changes are saved under too.
  async as(name: string): Promise<void> {
    const { revision } = await send<{ revision: string }>("PUT", this.at(name), { value: this.view, over: "" });
    this.name = name;
    this.revision = revision;
    this.names = await get<string[]>(`graphs/${this.graph}/views`);
    this.told("saved");
  }

  changed(): void {
    this.version++;
    this.told("saving");
    this.soon();
  }

  private readonly soon = later(() => void this.save(), 250);

  private async save(): Promise<void> {
    if (this.busy) {
      this.again = true;
      return;
    }
    this.busy = true;
    const { version } = this;
    try {
      const body = { value: this.view, over: this.revision };
      this.revision = (await send<{ revision: string }>("PUT", this.at(this.name), body)).revision;
      if (!this.names.includes(this.name)) this.names.push(this.name);
      // A change made in the meantime is not saved yet.
      if (version === this.version) this.told("saved");
    } catch (error) {
      this.told(error instanceof Refused && error.status === 409 ? "conflict" : "lost", (error as Error).message);
    } finally {
      this.busy = false;
      if (this.again) {
        this.again = false;
        void this.save();
      }
    }
  }

  pin(node: number, on = !this.view.pins.includes(node)): void {
    const { view } = this;
    view.pins = view.pins.filter((n) => n !== node);
    if (on) view.pins.push(node);
    else this.regroup((members) => members.filter((n) => n !== node));
    if (!on) delete view.places[String(node)];
    this.changed();
  }

  // Members leave any supernode that they are in, and are pinned.
  group(name: string, members: number[]): void {
    this.regroup((some) => some.filter((n) => !members.includes(n)));
    this.view.supernodes.push({ name, members });
    for (const n of members) if (!this.view.pins.includes(n)) this.view.pins.push(n);
    this.changed();
  }

  rename(name: string, to: string): Supernode {
    const { places, supernodes } = this.view;
    const place = places[`s ${name}`];
    if (place) places[`s ${to}`] = place;
    delete places[`s ${name}`];
    const renamed = supernodes.find((s) => s.name === name)!;
    renamed.name = to;
    this.changed();
    return renamed;
  }

  ungroup(name: string): void {
    this.view.supernodes = this.view.supernodes.filter((x) => x.name !== name);
    delete this.view.places[`s ${name}`];
    this.changed();
  }

  // A place belongs to a supernode's name: numbers change when one goes.
  private regroup(left: (members: number[]) => number[]): void {
    this.view.supernodes = this.view.supernodes
      .map((s) => ({ ...s, members: left(s.members) }))
      .filter((s) => s.members.length);
  }
}
