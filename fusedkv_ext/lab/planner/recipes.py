"""Launch commands of packaged configurations on machines with 8 GPUs, with memory and traffic per GPU."""

from __future__ import annotations

from typing import NamedTuple

from fusedkv_ext.distributed import Layout
from fusedkv_ext.lab.planner import shapes
from fusedkv_ext.lab.planner.job import Job
from fusedkv_ext.lab.planner.memory import memory
from fusedkv_ext.lab.planner.report import GB, number
from fusedkv_ext.lab.planner.traffic import traffic
from fusedkv_ext.lab.planner.weights import all_shapes, count

__all__ = ["RECIPES", "Recipe"]

_GPUS = 8  # per machine
_PLAN = "fusedkv"


class Recipe(NamedTuple):
    """A configuration, the number of machines, and the number of micro-batches per step."""

    config: str
    machines: int
    accumulate: int

    @property
    def layout(self) -> Layout:
        """Weights are sharded within a machine and replicated across machines."""
        return Layout(self.machines, _GPUS)

    def job(self, checkpointing: str = "none") -> Job:
        """The training job."""
        config = shapes.load(self.config)
        run = config.run
        batch = run.batch_size // (_GPUS * self.machines * self.accumulate)
        model = shapes.shape(config, _PLAN)
        length = config.data.seq_len
        return Job(model, self.layout, batch, length, self.accumulate, run.precision, checkpointing)

    @property
    def command(self) -> str:
        """The shell command for every machine."""
        run, out = f"{_PLAN}-{self.config}", f"{_PLAN}-{self.config}"
        where = ["torchrun --standalone"]
        if self.machines > 1:
            out = f"/shared/{out}"
            where = [f"torchrun --nnodes {self.machines} --rdzv-id {run} --rdzv-backend c10d"]
            where += ['--rdzv-endpoint "$HEAD:29400"']
        where[-1] += f" --nproc-per-node {_GPUS} --max-restarts 3 -m fusedkv_ext train"
        lines = [
            *where,
            f"--config {self.config} --plan {_PLAN} --text fineweb-edu/ --tokenizer tokenizer.json",
            f"--out {out} --resume --set run.accumulate={self.accumulate}",
            f"--set parallel.dp_replicate={self.machines} --set parallel.dp_shard={_GPUS}",
        ]
        return " \\\n    ".join(lines)

    def __str__(self) -> str:
        """Title, command and expected memory and traffic as Markdown."""
        job, layout = self.job(), self.layout
        size, received = memory(job), traffic(job)
        again = memory(self.job("non_reentrant")).peak
        saved = 12 * count(all_shapes(job.config))
        machines = "one machine" if self.machines == 1 else f"{self.machines} machines"
        between = f", {number(received.dp_replicate / GB)} GB of them from other machines"
        return (
            f"**{self.config} on {job.gpus} GPUs** ({machines})\n\n```sh\n{self.command}\n```\n\n"
            f"Layout {layout.dp_replicate} x {layout.dp_shard} (replicas x shards). Micro-batch "
            f"{job.batch}, {job.accumulate} per step, {job.tokens_per_step:,} tokens.\nExpected per GPU: "
            f"**{number(size.peak / GB)} GB** at the peak, of which {number(size.state / GB)} GB weights, "
            f"gradients and moments, {number(size.activations / GB)} GB activations,\n"
            f"{number(size.loss / GB)} GB in the loss; {number(again / GB)} GB with `--set "
            "parallel.activation_checkpointing=non_reentrant`.\n"
            f"{number(received.total / GB)} GB received per step{between * (self.machines > 1)}. "
            f"A checkpoint has {number(saved / GB)} GB, weights and moments in fp32.\n"
        )


RECIPES = (Recipe("332m", 1, 16), Recipe("332m", 8, 2), Recipe("1.5b", 1, 16), Recipe("1.5b", 8, 2))
