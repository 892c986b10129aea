"""Files as people and their systems leave them: which ones in a folder count, and which one a written name means."""

import os
import unicodedata
from pathlib import Path

# Names in lower case. Whatever starts with a dot is left out too: ._ files and .DS_Store of macOS, .Trash-1000, .ipynb_checkpoints.
BY_SYSTEMS = {
    *("thumbs.db", "ehthumbs.db", "desktop.ini", "$recycle.bin", "system volume information"),
    *(
        "__macosx",
        "network trash folder",
        "temporary items",
        "@eadir",
        "@tmp",
        "#recycle",
        "#snapshot",
        "lost+found",
    ),
}


def left_by_system(path):
    """Whether a relative path is something that a system left there, or lies in such a folder, or is hidden."""
    return any(part[0] == "." or part.lower() in BY_SYSTEMS for part in Path(path).parts)


def below(root):
    """The files below a folder, sorted, without what systems leave there; linked folders are not looked into.

    Links that lead nowhere are among them. Raises PermissionError for a folder that may not be read.
    """

    def refuse(error):
        raise PermissionError(
            f"{error.filename} cannot be looked into ({error.strerror}): allow reading it, or move it away."
        ) from error

    found = []
    for where, folders, names in os.walk(root, onerror=refuse):
        folders[:] = [name for name in folders if not left_by_system(name)]
        found += [Path(where, name) for name in names if not left_by_system(name)]
    return sorted(found)


def beside(paths):
    """The files in the same folders as these paths, sorted, without what systems leave there."""
    folders = {Path(path).parent for path in paths}
    found = [
        Path(folder, name) for folder in folders for names in names_in(folder).values() for name in names
    ]
    return sorted(path for path in found if path.is_file() and not left_by_system(path.name))


def names_in(folder):
    """What a folder holds: {name as `find` compares it: [names on disk]}; empty where it cannot be read."""
    names = {}
    try:
        for name in os.listdir(folder):
            names.setdefault(_compared(name), []).append(name)
    except (OSError, ValueError):  # no folder, a loop of links, a null byte
        pass
    return names


def find(root, name, listing=names_in):
    """The path below `root` that a list means by `name`, which need not exist: `root / name` where nothing fits it better.

    The name may have Windows' backslashes, and another Unicode form or other capital letters than on disk where only one file
    fits. listing: `names_in`, cached by whoever looks for many files.
    """
    for written in dict.fromkeys((name, name.replace("\\", "/"))):
        path = Path(root)
        for part in Path(written).parts:
            if not os.path.lexists(path / part):
                fitting = listing(path).get(_compared(part), [])
                part = fitting[0] if len(fitting) == 1 else part
            path = path / part
        if os.path.lexists(path):
            return path
    return Path(root, name)


def _compared(name):
    return unicodedata.normalize("NFC", unicodedata.normalize("NFC", name).casefold())
