"""The training workers of one run that a benchmark started, and of no other on the machine."""

from pathlib import Path

TITLE = "ray::RayTrainWorker"
"""How the title of a worker's process begins."""


def workers_of(pid: int) -> list[int]:
    """Process ids of the workers below process `pid`, oldest first."""
    parents: dict[int, int] = {}
    titles: dict[int, str] = {}
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            try:
                stat = (folder / "stat").read_text().rpartition(")")[2].split()
                titles[int(folder.name)] = (folder / "cmdline").read_text()
                parents[int(folder.name)] = int(stat[1])
            except OSError:  # it ended meanwhile
                continue

    def below(process: int) -> bool:
        while process in parents:
            process = parents[process]
            if process == pid:
                return True
        return False

    return sorted(found for found, title in titles.items() if title.startswith(TITLE) and below(found))
