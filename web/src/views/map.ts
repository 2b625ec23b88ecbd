// The feature map: all features as points, similar ones near each other, with the labels of clusters.
import { bytes, get, type Bundle, type Feature, type Found, type Group } from "../api";
import { button, field, fill, h, later } from "../dom";
import { count, name, percent, visible } from "../format";
import { trail } from "../trail";

const REACH = 8;
const SHADES = 64;
const MOST_NAMES = 300;

interface Points {
  ids: Uint32Array;
  xs: Float32Array;
  ys: Float32Array;
  groups: Int32Array;
  densities: Float32Array;
}

export async function mapView(main: HTMLElement, id: string, query: URLSearchParams): Promise<() => void> {
  const bundle = await get<Bundle>(`bundles/${id}`);
  document.title = `feature map · ${bundle.scan || bundle.clt}`;
  trail(h("a", { href: `#/bundle/${id}` }, "features"), h("span", {}, "feature map"));
  let level = Math.min(Number(query.get("level") ?? bundle.levels - 1), bundle.levels - 1);
  let colour = "layer";
  let marked = new Set<number>();
  let wanted = query.get("group");
  const canvas = h("canvas", {
    class: "map",
    tabindex: 0,
    role: "img",
    "aria-label": "Feature map. Arrow keys move it, plus and minus zoom; use the search to find features by text.",
  });
  const said = h(
    "p",
    { role: "status", class: "soft" },
    "Each point is a feature; nearby features coactivate and have similar decoders. Click one to open it.",
  );
  const list = h("ol", { class: "list" });
  const levels = h(
    "select",
    {},
    ...Array.from({ length: bundle.levels }, (_, i) =>
      h(
        "option",
        { value: i, selected: i === level },
        i === 0 ? "finest" : i === bundle.levels - 1 ? "coarsest" : i + 1,
      ),
    ),
  );
  levels.addEventListener("change", () => {
    level = Number(levels.value);
    void load(false);
  });
  const colours = h("select", {}, ...["layer", "cluster", "density"].map((c) => h("option", {}, c)));
  colours.addEventListener("change", () => {
    colour = colours.value;
    draw();
  });
  const search = h("input", { type: "search", placeholder: "label or token", input: later(() => void look()) });
  fill(
    main,
    h("h1", {}, "Feature map"),
    h(
      "div",
      { class: "row" },
      field("Search", search),
      field("Clusters", levels),
      field("Colour by", colours),
      button("Reset view", () => {
        fit();
        draw();
      }),
    ),
    canvas,
    said,
    list,
  );
  let points: Points = {
    ids: new Uint32Array(),
    xs: new Float32Array(),
    ys: new Float32Array(),
    groups: new Int32Array(),
    densities: new Float32Array(),
  };
  let named = new Map<number, Group>();
  let [scale, left, top, frame, hovered] = [1, 0, 0, 0, -1];

  async function look(): Promise<void> {
    const words = search.value.trim();
    const found = words ? await get<Found[]>(`bundles/${id}/search?limit=500&q=${encodeURIComponent(words)}`) : [];
    marked = new Set(found.map((f) => f.layer * bundle.n_features + f.index));
    said.textContent = words ? `${found.length}${found.length === 500 ? " or more" : ""} match` : "";
    fill(
      list,
      ...found
        .slice(0, 12)
        .map((f) =>
          h(
            "li",
            {},
            h("a", { href: `#/bundle/${id}/${f.layer}/${f.index}` }, name(f.layer, f.index)),
            h("span", { class: "label" }, f.label ?? ""),
          ),
        ),
    );
    draw();
  }

  async function load(anew: boolean): Promise<void> {
    const [raw, found] = await Promise.all([
      bytes(`bundles/${id}/map?level=${level}`),
      get<Group[]>(`bundles/${id}/groups/${level}`),
    ]);
    const n = new DataView(raw).getUint32(0, true);
    const at = (column: number): [ArrayBuffer, number, number] => [raw, 4 + 4 * n * column, n];
    points = {
      ids: new Uint32Array(...at(0)),
      xs: new Float32Array(...at(1)),
      ys: new Float32Array(...at(2)),
      groups: new Int32Array(...at(3)),
      densities: new Float32Array(...at(4)),
    };
    named = new Map(found.map((g) => [g.number, g]));
    if (wanted !== null) {
      const group = Number(wanted);
      marked = new Set([...points.ids].filter((_, i) => points.groups[i] === group));
      const g = named.get(group);
      const feeding = g?.fed_by
        .map(([from, share]) => `${named.get(from)?.label ?? from} (${percent(share, 0)})`)
        .join(", ");
      said.textContent = g ? `${g.label}: ${count(g.size)} features${feeding ? `; inputs from ${feeding}` : ""}` : "";
      wanted = null;
    }
    if (anew) fit();
    draw();
  }

  function fit(): void {
    canvas.width = canvas.clientWidth * devicePixelRatio;
    canvas.height = canvas.clientHeight * devicePixelRatio;
    const { xs, ys } = points;
    let [x0, x1, y0, y1] = [Infinity, -Infinity, Infinity, -Infinity];
    for (let i = 0; i < xs.length; i++) {
      x0 = Math.min(x0, xs[i]!);
      x1 = Math.max(x1, xs[i]!);
      y0 = Math.min(y0, ys[i]!);
      y1 = Math.max(y1, ys[i]!);
    }
    scale = 0.95 * Math.min(canvas.width / (x1 - x0 || 1), canvas.height / (y1 - y0 || 1));
    left = canvas.width / 2 - (scale * (x0 + x1)) / 2;
    top = canvas.height / 2 - (scale * (y0 + y1)) / 2;
  }

  function draw(): void {
    cancelAnimationFrame(frame);
    frame = requestAnimationFrame(paint);
  }

  // Between 0 and 1, by what points are coloured by.
  function shade(i: number): number {
    if (colour === "layer") return Math.floor(points.ids[i]! / bundle.n_features) / Math.max(1, bundle.n_layers - 1);
    if (colour === "cluster") return (((points.groups[i]! * 0.618034) % 1) + 1) % 1;
    return Math.min(1, Math.max(0, (Math.log10(points.densities[i]! + 1e-7) + 6) / 6));
  }

  // Points are written as pixels: half a million of them are too many for the canvas' own shapes.
  function paint(): void {
    const pen = canvas.getContext("2d", { willReadFrequently: true })!;
    const style = getComputedStyle(canvas);
    const { width, height } = canvas;
    if (!width || !height) return;
    pen.fillStyle = style.backgroundColor;
    pen.fillRect(0, 0, width, height);
    const image = pen.getImageData(0, 0, width, height);
    const pixels = new Uint32Array(image.data.buffer);
    const ground = pixels[0]!;
    const colours = palette(colour === "cluster", marked.size ? 0.25 : 1, ground);
    pen.fillStyle = style.backgroundColor;
    const few = points.xs.length < 50_000;
    const size = Math.round(Math.max(few ? 3 : 1, Math.min(7, scale * 0.06 + (few ? 2 : 0.5))) * devicePixelRatio);
    for (let i = 0; i < points.xs.length; i++) {
      const x = Math.round(left + scale * points.xs[i]! - size / 2);
      const y = Math.round(top + scale * points.ys[i]! - size / 2);
      if (x < 0 || y < 0 || x + size > width || y + size > height) continue;
      const tint = colours[Math.min(SHADES - 1, Math.floor(shade(i) * SHADES))]!;
      for (let row = 0; row < size; row++) pixels.fill(tint, (y + row) * width + x, (y + row) * width + x + size);
    }
    pen.putImageData(image, 0, 0);
    if (marked.size || hovered >= 0) {
      pen.fillStyle = style.color;
      for (let i = 0; i < points.xs.length; i++) {
        if (i !== hovered && !marked.has(points.ids[i]!)) continue;
        pen.beginPath();
        pen.arc(left + scale * points.xs[i]!, top + scale * points.ys[i]!, size / 2 + 1.5 * devicePixelRatio, 0, 7);
        pen.fill();
      }
    }
    names(pen, style.color, style.backgroundColor);
    canvas.dataset.points = String(points.xs.length);
  }

  function names(pen: CanvasRenderingContext2D, ink: string, ground: string): void {
    const sums = new Map<number, [number, number, number]>();
    for (let i = 0; i < points.xs.length; i++) {
      const g = points.groups[i]!;
      if (g < 0 || g >= MOST_NAMES) continue;
      const sum = sums.get(g) ?? [0, 0, 0];
      if (!sum[2]) sums.set(g, sum);
      sum[0] += points.xs[i]!;
      sum[1] += points.ys[i]!;
      sum[2] += 1;
    }
    const line = 16 * devicePixelRatio;
    pen.font = `600 ${12 * devicePixelRatio}px system-ui, sans-serif`;
    pen.textAlign = "center";
    pen.lineJoin = "round";
    const taken: [number, number, number][] = [];
    for (const [g, [x, y, n]] of [...sums].sort((a, b) => b[1][2] - a[1][2])) {
      const [px, py] = [left + (scale * x) / n, top + (scale * y) / n];
      const text = visible(named.get(g)?.label ?? "").slice(0, 36);
      const half = pen.measureText(text).width / 2 + 4;
      const hidden = px < half || py < line || px > canvas.width - half || py > canvas.height - line;
      if (!text || hidden || taken.some(([a, b, w]) => Math.abs(a - px) < w + half && Math.abs(b - py) < line))
        continue;
      taken.push([px, py, half]);
      pen.lineWidth = 4 * devicePixelRatio;
      pen.strokeStyle = ground;
      pen.strokeText(text, px, py);
      pen.fillStyle = ink;
      pen.fillText(text, px, py);
    }
  }

  function at(event: MouseEvent): number {
    const box = canvas.getBoundingClientRect();
    const x = (event.clientX - box.left) * devicePixelRatio;
    const y = (event.clientY - box.top) * devicePixelRatio;
    let [best, least] = [-1, (REACH * devicePixelRatio) ** 2];
    for (let i = 0; i < points.xs.length; i++) {
      const far = (left + scale * points.xs[i]! - x) ** 2 + (top + scale * points.ys[i]! - y) ** 2;
      if (far < least) [best, least] = [i, far];
    }
    return best;
  }
  const place = (i: number): [number, number] => [
    Math.floor(points.ids[i]! / bundle.n_features),
    points.ids[i]! % bundle.n_features,
  ];
  const tell = later(async (i: number) => {
    const [l, n] = place(i);
    const f = await get<Feature>(`bundles/${id}/features/${l}/${n}`);
    said.textContent = `${name(l, n)} ${f.label ?? "no label"} · ${percent(f.density, 3)} of tokens`;
  }, 60);

  let drag: [number, number] | null = null;
  let moved = false;
  canvas.addEventListener("pointerdown", (e) => {
    drag = [e.clientX, e.clientY];
    moved = false;
    canvas.setPointerCapture(e.pointerId);
  });
  canvas.addEventListener("pointermove", (e) => {
    if (drag) {
      const [dx, dy] = [e.clientX - drag[0], e.clientY - drag[1]];
      if (Math.abs(dx) + Math.abs(dy) > 3) moved = true;
      if (moved) shift(dx, dy);
      if (moved) drag = [e.clientX, e.clientY];
      return;
    }
    const i = at(e);
    canvas.style.cursor = i >= 0 ? "pointer" : "grab";
    if (i === hovered) return;
    hovered = i;
    if (i >= 0) tell(i);
    draw();
  });
  canvas.addEventListener("pointerup", (e) => {
    drag = null;
    const i = moved ? -1 : at(e);
    if (i >= 0) location.hash = `#/bundle/${id}/${place(i).join("/")}`;
  });
  function shift(dx: number, dy: number): void {
    left += dx * devicePixelRatio;
    top += dy * devicePixelRatio;
    draw();
  }
  function zoom(by: number, x = canvas.width / 2, y = canvas.height / 2): void {
    left = x - (x - left) * by;
    top = y - (y - top) * by;
    scale *= by;
    draw();
  }
  canvas.addEventListener(
    "wheel",
    (e) => {
      e.preventDefault();
      const box = canvas.getBoundingClientRect();
      zoom(
        Math.exp(-e.deltaY / 400),
        (e.clientX - box.left) * devicePixelRatio,
        (e.clientY - box.top) * devicePixelRatio,
      );
    },
    { passive: false },
  );
  const keys: Record<string, () => void> = {
    "+": () => zoom(1.3),
    "-": () => zoom(1 / 1.3),
    ArrowLeft: () => shift(60, 0),
    ArrowRight: () => shift(-60, 0),
    ArrowUp: () => shift(0, 60),
    ArrowDown: () => shift(0, -60),
  };
  canvas.addEventListener("keydown", (e) => {
    const work = keys[e.key];
    if (!work) return;
    e.preventDefault();
    work();
  });
  const resized = (): void => {
    fit();
    draw();
  };
  window.addEventListener("resize", resized);
  await load(true);
  // Its size is known only once the view is in place.
  requestAnimationFrame(resized);
  return () => {
    window.removeEventListener("resize", resized);
    cancelAnimationFrame(frame);
  };
}

// From dark to light, safe for colour-blind readers: viridis without its palest yellow. Clusters go round once.
const STOPS = [
  [72, 36, 117],
  [62, 83, 160],
  [33, 145, 140],
  [80, 190, 110],
  [210, 190, 40],
];

// Pixels of all shades, mixed with the ground.
function palette(round: boolean, strength: number, ground: number): number[] {
  return Array.from({ length: SHADES }, (_, i) => {
    const at = (i / (SHADES - 1)) * (STOPS.length - 1);
    const [k, part] = [Math.min(STOPS.length - 2, Math.floor(at)), at - Math.min(STOPS.length - 2, Math.floor(at))];
    const rgb = round ? wheel(i / SHADES) : STOPS[k]!.map((v, c) => v + (STOPS[k + 1]![c]! - v) * part);
    const mixed = rgb.map((v, c) => Math.round(v * strength + ((ground >> (8 * c)) & 255) * (1 - strength)));
    return (0xff000000 | (mixed[2]! << 16) | (mixed[1]! << 8) | mixed[0]!) >>> 0;
  });
}

function wheel(turn: number): number[] {
  return [0, 1 / 3, 2 / 3].map((shift) => 135 + 85 * Math.cos(2 * Math.PI * (turn - shift)));
}
