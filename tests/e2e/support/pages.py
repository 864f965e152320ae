"""The commands and files that documents show, for tests that run them unchanged."""

import re
import textwrap

from support.daemon import REPOSITORY

# The first line of a code block that shows a file: a comment with the name of the file.
NAME = re.compile(r"(?:#|//) (?:/[\w./-]+/)?([\w.-]+\.\w+)\n")
COMMANDS = re.compile(r"^( *)```sh\n(.*?)^ *```$", re.MULTILINE | re.DOTALL)


def sections(path):
    """The (title, blocks) of each section of a page after the first title. A block is (language, text)."""
    for section in path.read_text().split("\n## ")[1:]:
        title, rest = section.split("\n", 1)
        yield title, re.findall(r"^```(\w*)\n(.*?)^```$", rest, re.MULTILINE | re.DOTALL)


def file_name(text):
    """The name of the file that a code block shows, or None."""
    name = NAME.match(text)
    return name and name.group(1)


def all_commands(text):
    """The (line number, text) of each block of commands in the text of a page."""
    return [(text.count("\n", 0, block.start()) + 1, textwrap.dedent(block[2])) for block in COMMANDS.finditer(text)]


def commands(page, begin):
    """The block of commands of a page that begins with `begin`, unchanged.

    Write both arguments as literals: test_documents.py searches for calls of this function, and reports every other block of commands as
    one that no test runs."""
    [found] = [text for _, text in all_commands((REPOSITORY / page).read_text()) if text.startswith(begin)]
    return found
