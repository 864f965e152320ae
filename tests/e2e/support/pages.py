"""The commands and files that documents show, for the tests that run them as they stand there."""

import re
import textwrap

from support.daemon import REPOSITORY

# The first line of a block that is a file: a comment with its name.
NAME = re.compile(r"(?:#|//) (?:/[\w./-]+/)?([\w.-]+\.\w+)\n")
COMMANDS = re.compile(r"^( *)```sh\n(.*?)^ *```$", re.MULTILINE | re.DOTALL)


def sections(path):
    """(title, its blocks as (language, text)) of a page, but for what stands before the first title."""
    for section in path.read_text().split("\n## ")[1:]:
        title, rest = section.split("\n", 1)
        yield title, re.findall(r"^```(\w*)\n(.*?)^```$", rest, re.MULTILINE | re.DOTALL)


def file_name(text):
    """The name of the file that a block is; None if it is none."""
    name = NAME.match(text)
    return name and name.group(1)


def all_commands(text):
    """(line, text) of each block of commands in the text of a page."""
    return [(text.count("\n", 0, block.start()) + 1, textwrap.dedent(block[2])) for block in COMMANDS.finditer(text)]


def commands(page, begin):
    """The block of commands of a page that begins so, as it stands there, for the test that runs it: test_documents.py looks for
    calls of this function with both arguments written out, and takes the others for commands that nothing runs."""
    [found] = [text for _, text in all_commands((REPOSITORY / page).read_text()) if text.startswith(begin)]
    return found
