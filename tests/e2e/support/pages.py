"""The commands and files that a page of docs/ shows, for the runners that try them as they stand there."""

import re

# The first line of a block that is a file: a comment with its name.
NAME = re.compile(r"(?:#|//) (?:/[\w./-]+/)?([\w.-]+\.\w+)\n")


def sections(path):
    """(title, its blocks as (language, text)) of a page, but for what stands before the first title."""
    for section in path.read_text().split("\n## ")[1:]:
        title, rest = section.split("\n", 1)
        yield title, re.findall(r"^```(\w*)\n(.*?)^```$", rest, re.MULTILINE | re.DOTALL)


def file_name(text):
    """The name of the file that a block is; None if it is none."""
    name = NAME.match(text)
    return name and name.group(1)
