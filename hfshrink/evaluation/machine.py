"""What this machine says about itself: its processor's name, and its energy counters."""

from __future__ import annotations

import platform
from pathlib import Path

POWERCAP = Path("/sys/class/powercap")


def processor_name() -> str:
    """The name of this machine's processor."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8", errors="replace").splitlines() if info.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine() or "unknown"


def read_energy(powercap: Path = POWERCAP) -> dict[str, tuple[int, int]] | None:
    """Processor package -> (microjoules so far, value at which it starts again); None without a readable counter."""
    found = {}
    try:
        for zone in sorted(powercap.glob("*rapl:*")):
            kind = (zone / "name").read_text(encoding="utf-8").strip()
            if kind.startswith("package"):  # others are parts of a package, or the platform that holds them all
                values = ((zone / name).read_text(encoding="utf-8") for name in ("energy_uj", "max_energy_range_uj"))
                energy, largest = (int(value) for value in values)
                found[zone.name] = energy, largest
    except (OSError, ValueError):
        return None
    return found or None
