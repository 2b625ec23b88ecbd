// A graph as SVG and PNG: the same painting, once written down as shapes and once as pixels.
import { download } from "../dom";
import type { Layout } from "./layout";
import type { Net } from "./net";
import { paintBase, paintChosen, type Colours } from "./paint";

export interface Picture {
  net: Net;
  layout: Layout;
  colours: Colours;
  pinned: Set<number>;
  chosen: number;
}

function paint(pen: CanvasRenderingContext2D, p: Picture): void {
  paintBase(pen, p.net, p.layout, p.colours, p.pinned);
  if (p.chosen >= 0) paintChosen(pen, p.net, p.layout, p.colours, p.chosen);
}

export function savePng(p: Picture, name: string): void {
  const canvas = document.createElement("canvas");
  canvas.width = 2 * p.layout.width;
  canvas.height = 2 * p.layout.height;
  const pen = canvas.getContext("2d")!;
  pen.scale(2, 2);
  paint(pen, p);
  canvas.toBlob((blob) => blob && download(blob, `${name}.png`));
}

export function saveSvg(p: Picture, name: string): void {
  const pen = new SvgPen();
  paint(pen as unknown as CanvasRenderingContext2D, p);
  download(new Blob([pen.text(p.layout.width, p.layout.height)], { type: "image/svg+xml" }), `${name}.svg`);
}

const escaped = (text: string): string =>
  text.replace(/[<>&"]/g, (c) => `&#${c.charCodeAt(0)};`).replace(/[^\P{Cc}\n\t]/gu, "");

// The methods of a canvas' pen that `paint` uses, written down as SVG.
class SvgPen {
  fillStyle = "";
  strokeStyle = "";
  globalAlpha = 1;
  lineWidth = 1;
  font = "";
  textAlign = "left";
  textBaseline = "";
  private parts: string[] = [];
  private path: string[] = [];
  private turned = "";
  private readonly ruler = document.createElement("canvas").getContext("2d")!;

  save(): void {
    this.turned = "";
  }
  restore(): void {
    this.turned = "";
  }
  translate(x: number, y: number): void {
    this.turned += `translate(${x.toFixed(1)},${y.toFixed(1)}) `;
  }
  rotate(angle: number): void {
    this.turned += `rotate(${((angle * 180) / Math.PI).toFixed(1)}) `;
  }
  measureText(text: string): TextMetrics {
    this.ruler.font = this.font;
    return this.ruler.measureText(text);
  }
  beginPath(): void {
    this.path = [];
  }
  moveTo(x: number, y: number): void {
    this.path.push(`M${x.toFixed(1)},${y.toFixed(1)}`);
  }
  lineTo(x: number, y: number): void {
    this.path.push(`L${x.toFixed(1)},${y.toFixed(1)}`);
  }
  bezierCurveTo(...p: number[]): void {
    this.path.push(`C${p.map((v) => v.toFixed(1)).join(" ")}`);
  }
  arc(x: number, y: number, r: number): void {
    const d = `${r.toFixed(1)},${r.toFixed(1)} 0 1,0`;
    this.path.push(`M${(x - r).toFixed(1)},${y.toFixed(1)}a${d} ${(2 * r).toFixed(1)},0a${d} ${(-2 * r).toFixed(1)},0`);
  }
  rect(x: number, y: number, w: number, h: number): void {
    this.path.push(`M${x.toFixed(1)},${y.toFixed(1)}h${w.toFixed(1)}v${h.toFixed(1)}h${(-w).toFixed(1)}z`);
  }
  closePath(): void {
    this.path.push("z");
  }
  fillRect(x: number, y: number, w: number, h: number): void {
    const [left, top, wide, tall] = [x, y, w, h].map((v) => v.toFixed(1));
    this.parts.push(`<rect x="${left}" y="${top}" width="${wide}" height="${tall}" ${this.filled()}/>`);
  }
  fill(): void {
    if (this.path.length) this.parts.push(`<path d="${this.path.join("")}" ${this.filled()}/>`);
  }
  stroke(): void {
    if (!this.path.length) return;
    const line = `stroke-width="${this.lineWidth.toFixed(2)}" stroke-opacity="${this.globalAlpha.toFixed(3)}"`;
    this.parts.push(`<path d="${this.path.join("")}" fill="none" stroke="${this.strokeStyle}" ${line}/>`);
  }
  fillText(text: string, x: number, y: number): void {
    const anchor = { right: "end", center: "middle" }[this.textAlign] ?? "start";
    const place = `x="${x.toFixed(1)}" y="${y.toFixed(1)}" transform="${this.turned}" fill="${this.fillStyle}"`;
    const letters = `font-family="sans-serif" font-size="11" text-anchor="${anchor}" dominant-baseline="middle"`;
    this.parts.push(`<text ${place} ${letters}>${escaped(text)}</text>`);
  }
  text(width: number, height: number): string {
    const box = `width="${width}" height="${height}" viewBox="0 0 ${width} ${height}"`;
    return `<svg xmlns="http://www.w3.org/2000/svg" ${box}>${this.parts.join("")}</svg>`;
  }
  private filled(): string {
    return `fill="${this.fillStyle}" fill-opacity="${this.globalAlpha.toFixed(3)}"`;
  }
}
