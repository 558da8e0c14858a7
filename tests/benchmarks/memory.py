"""The memory that a plan predicts beside what a process is seen to use: the programs of a step of full-size Stable Diffusion 1.5 on a CPU.

  python tests/benchmarks/memory.py [MODEL [SIDE]]     such as sd15 256

One step of Diffusion-DPO with LoRA in float32, one pair, on one CPU device. Every program is compiled, its arguments are made of
ones, and it is called twice; measured is how far the process's resident memory rose in the second call from before to its highest
meanwhile (VmHWM of /proc, which Linux lets a process reset). What stays is measured as it is made.
"""

import os
import runpy
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
os.environ["JAX_PLATFORMS"] = "cpu"


def resident(what: str) -> int:
    """Bytes: VmRSS now, VmHWM at most since the last reset."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(what))
    return int(line.split()[1]) * 1024


def main(model: str = "sd15", side: str = "256") -> None:
    import full_size
    import jax
    import jax.numpy as jnp

    from alignment_jax.training import abstract, plan, sharding

    plans = runpy.run_path(str(ROOT / "launch" / "plans.py"))
    full_size.write_all(full_size.FOLDER)
    config = plans["config"](f"{model}-dpo-lora-512-v5e:1x1", full_size.FOLDER)
    config.model_options.update(height=int(side), width=int(side), param_dtype="float32", dtype="float32")
    config.batch.update(prompts=1, group=1, microbatch=1)
    config.reward = ""
    on = sharding.layout({})
    programs = abstract.one_step(config, on=on)
    programs.pop("init")
    made: dict[int, jax.Array] = {}

    def real(shape: jax.ShapeDtypeStruct) -> jax.Array:
        if id(shape) not in made:
            key = jnp.issubdtype(shape.dtype, jax.dtypes.prng_key)
            made[id(shape)] = jax.random.split(jax.random.key(0), shape.shape) if key else jnp.ones(shape.shape, shape.dtype)
        return made[id(shape)]

    before = resident("VmRSS")
    stays = jax.tree.map(real, (programs["apply"].arguments[0], programs["rollout"].arguments[1]))
    jax.block_until_ready(stays)
    said = sum(plan.stays(programs["apply"].arguments[0], programs["rollout"].arguments[1]).values())
    print(f"| {model} {side} | predicted GiB | measured GiB | ratio |\n| --- | --- | --- | --- |")
    show = lambda name, a, b: print(f"| {name} | {a / 2**30:.3f} | {b / 2**30:.3f} | {b / a:.2f} |", flush=True)
    show("what stays", said, resident("VmRSS") - before)
    for name in ("encode", "to_samples", "anchor", "gradient"):
        program = programs[name]
        arguments = jax.tree.map(real, program.arguments)
        compiled = program.function.lower(*program.arguments).compile()
        memory = compiled.memory_analysis()
        for _ in range(2):  # libraries make themselves at home in the first call
            jax.block_until_ready(arguments)
            Path("/proc/self/clear_refs").write_text("5")
            before = resident("VmRSS")
            jax.block_until_ready(compiled(*arguments))
            most = resident("VmHWM") - before
        show(name, memory.temp_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes, most)


if __name__ == "__main__":
    main(*sys.argv[1:])
