"""Profiles of a few warm steps: `profile=torch|nsys|ncu`."""

import importlib
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import torch

from hrm.common.errors import UserError
from hrm.common.regions import opened_by
from hrm.config.load import Config

Say = Callable[[str], None]


class Profile:
    """Profiles `config.profile_steps` steps after a warm-up of `config.profile_after` steps.

    nsys and ncu: cudaProfilerStart and cudaProfilerStop around those steps and NVTX ranges within, for a run
    under `nsys profile --capture-range=cudaProfilerApi` or `ncu --profile-from-start off`. torch: a trace for
    chrome://tracing or Perfetto and a table of the operations that took longest, in `run_dir`/profile.
    captured: steps are replayed from a CUDA graph, of which a profile shows only the kernels; a note says so.
    Raises UserError for a kind of profile that this device or installation does not support.
    """

    def __init__(
        self, config: Config, run_dir: Path, device: torch.device, say: Say, captured: bool = False
    ) -> None:
        self.kind, self.folder, self.say = config.profile, run_dir / "profile", say
        self.first, self.last = config.profile_after + 1, config.profile_after + config.profile_steps
        self.steps = 0
        self._taking, self._ranges = False, ExitStack()
        self.device = device
        self._profiler: torch.profiler.profile | None = None
        if self.kind != "none" and captured:
            say(
                "profile: mode=graph replays a step as one launch, so its kernels show but not its parts "
                "(cycles, target pass, backward, optimiser); mode=compile or mode=eager shows them"
            )
        if self.kind in ("nsys", "ncu"):
            if device.type != "cuda":
                raise UserError(
                    f"profile={self.kind} needs a CUDA device, and this run is on {device.type}: "
                    "use profile=torch"
                )
            try:
                self._annotate = importlib.import_module("nvtx").annotate
            except ImportError:
                raise UserError(
                    f"profile={self.kind} needs the package nvtx: pip install 'hrm-kernels[profile]'"
                ) from None

    def __enter__(self) -> "Profile":
        return self

    def __exit__(self, *_: object) -> None:
        if self._taking:
            self._stop()

    def before_step(self) -> None:
        """Starts the profile before its first step."""
        self.steps += 1
        if self.kind != "none" and self.steps == self.first:
            self._start()

    def after_step(self) -> None:
        """Ends the profile after its last step."""
        if self.kind != "none" and self.steps == self.last:
            self._stop()

    def _start(self) -> None:
        self._taking = True
        self._synchronize()
        if self.kind == "torch":
            activities = [torch.profiler.ProfilerActivity.CPU]
            if self.device.type == "cuda":
                activities.append(torch.profiler.ProfilerActivity.CUDA)
            self._profiler = torch.profiler.profile(activities=activities)
            self._profiler.start()
            self._ranges.enter_context(opened_by(torch.profiler.record_function))
        else:
            torch.cuda.profiler.start()
            self._ranges.enter_context(opened_by(self._annotate))

    def _stop(self) -> None:
        self._ranges.close()
        self._taking = False
        self._synchronize()
        if self._profiler is None:
            torch.cuda.profiler.stop()
            return
        self._profiler.stop()
        self.folder.mkdir(parents=True, exist_ok=True)
        trace, table = self.folder / "trace.json.gz", self.folder / "table.txt"
        self._profiler.export_chrome_trace(str(trace))
        by = "self_cuda_time_total" if self.device.type == "cuda" else "self_cpu_time_total"
        averages = self._profiler.key_averages()
        table.write_text(averages.table(sort_by=by, row_limit=50, max_name_column_width=80) + "\n")
        self._profiler = None
        self.say(f"profile of steps {self.first} to {min(self.steps, self.last)}: {trace}, {table}")

    def _synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
