// Builds the page into the package, with a hash of the sources that a test compares: a stale build is found without Node.
import { build } from "esbuild";
import { createHash } from "node:crypto";
import { copyFileSync, mkdirSync, readFileSync, readdirSync, writeFileSync } from "node:fs";

const out = new URL("../src/crosslayer/serve/static/", import.meta.url).pathname;
const src = new URL("./src/", import.meta.url).pathname;
mkdirSync(out, { recursive: true });
await build({
  entryPoints: [`${src}main.ts`],
  bundle: true,
  minify: true,
  format: "esm",
  target: "es2022",
  outfile: `${out}page.js`,
  legalComments: "none",
});
for (const file of ["index.html", "page.css"]) copyFileSync(`${src}${file}`, `${out}${file}`);
const hash = createHash("sha256");
const files = readdirSync(src, { recursive: true, withFileTypes: true })
  .filter((f) => f.isFile())
  .map((f) => `${f.parentPath}/${f.name}`.replaceAll("//", "/").slice(src.length))
  .sort();
for (const file of files)
  hash
    .update(file)
    .update("\0")
    .update(readFileSync(`${src}${file}`))
    .update("\0");
writeFileSync(`${out}built-from.txt`, `${hash.digest("hex")}\n`);
