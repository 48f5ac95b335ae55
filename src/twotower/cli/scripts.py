"""The command line of a benchmark or script: its docstring, and flags with their defaults."""

import argparse


class _Help(argparse.RawDescriptionHelpFormatter):
    """Help with the default of every flag that has one."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        value = action.default
        if value in (None, False, [], argparse.SUPPRESS):
            return action.help
        shown = " ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
        return f"{action.help} (default: {shown.replace('%', '%%')})"


def script_parser(doc: str | None, prog: str | None = None) -> argparse.ArgumentParser:
    """A parser that says what a script does; doc: the script's `__doc__`."""
    return argparse.ArgumentParser(prog=prog, description=doc, formatter_class=_Help)
