"""xterm.js for a widget, as this machine's JupyterLab carries it: nothing is fetched, and no copy lies in this project.

JupyterLab's own terminals are drawn by ``@xterm/xterm`` (MIT licence), which is a module inside one of the scripts that
the Python package ``jupyterlab`` installs. Such a script pushes its modules, functions of ``(module, exports,
require)``, onto a list of the global ``self``; here it is put inside a function with a ``self`` of its own, and the one
module that is a terminal is called. A script is known by what it holds and not by its name, which is a hash.

Leaves out its style sheet, which is part of a larger one; :file:`terminal.css` has the rules without which it is not a
terminal.
"""

from __future__ import annotations

import functools
import importlib.util
from pathlib import Path
from typing import Final

# The first is the keyboard's element, the second a name of the public interface: no other script has both.
MARKS: Final = (b"xterm-helper-textarea", b"registerCsiHandler")

_BEFORE: Final = "const Terminal = (() => {\nconst self = {};\n"
_AFTER: Final = """
const [[, modules]] = Object.values(self)[0];
const terminal = Object.values(modules).find((each) => each.toString().includes("registerCsiHandler"));
const require = () => ({});
require.r = () => {};
require.d = (target, getters) => {
  for (const name in getters) Object.defineProperty(target, name, { enumerable: true, get: getters[name] });
};
const module = { exports: {} };
terminal.call(module.exports, module, module.exports, require);
return module.exports.Terminal;
})();
"""


@functools.cache
def terminal_script() -> str | None:
    """A script that defines ``Terminal``, the class of xterm.js; None where there is no JupyterLab that has it."""
    found = importlib.util.find_spec("jupyterlab")
    if found is None or found.origin is None:
        return None
    for script in sorted((Path(found.origin).parent / "static").glob("*.js")):
        data = script.read_bytes()
        if all(mark in data for mark in MARKS):
            return f"{_BEFORE}{data.decode()}{_AFTER}"
    return None
