"""Compares the student with its teacher: `python -m noisepolicy.benchmarks.distilled WORK_FOLDER`.

For held-out captions, from the same seeds: reward, share of strictly right pictures, mean reward of the best of a
group, variety (root mean square difference of two pictures of a caption, as in the evaluation of policies), also as a
share of the teacher's, and pictures a second on one core. WORK_FOLDER is where `pretrain.py` left the teacher; the
student is its own, or the shipped one with `--shipped`.
"""

import argparse
import json
import time
from pathlib import Path

import torch

from noisepolicy.evaluation.statistics import mean_pairwise_distance
from noisepolicy.frozen import FrozenDiffusersPipeline
from noisepolicy.ops import gaussian_sample
from noisepolicy.worlds.turbo import held_out_scenes, model_folder
from noisepolicy.worlds.turbo.reward import score


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work_folder", type=Path)
    parser.add_argument("--shipped", action="store_true", help="measure the package's student")
    parser.add_argument("--num-prompts", type=int, default=32)
    parser.add_argument("--group-size", type=int, default=8)
    parser.add_argument("--teacher-steps", type=int, nargs="+", default=[2, 16])
    parser.add_argument("--student-steps", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--guidance-scale", type=float, default=2.0, help="of the teacher")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16")
    arguments = parser.parse_args()
    torch.set_num_threads(1)

    student = model_folder() if arguments.shipped else arguments.work_folder / "model"
    models = [
        ("teacher", arguments.work_folder / "teacher", arguments.guidance_scale, sorted(arguments.teacher_steps)[::-1]),
        ("student", student, 1.0, arguments.student_steps),
    ]
    print("model    steps  reward  strict  best of group  variety  of the teacher's  pictures/s")
    rows, most_variety = [], 0.0
    for name, folder, guidance_scale, step_counts in models:
        frozen = FrozenDiffusersPipeline.from_pretrained(folder, dtype=getattr(torch, arguments.dtype))
        for num_steps in step_counts:
            row = measure(frozen, num_steps, guidance_scale, arguments.num_prompts, arguments.group_size)
            most_variety = most_variety or row["variety"]  # the teacher's with its most steps
            row["of_teacher"] = row["variety"] / most_variety
            rows.append({"model": name, "steps": num_steps} | row)
            print(
                f"{name} {num_steps:6d}  {row['reward']:.3f}   {row['strict']:.3f}   {row['best']:.3f}          "
                f"{row['variety']:.3f}    {row['of_teacher']:4.0%}              {row['pictures_per_s']:.1f}",
                flush=True,
            )
    print(json.dumps(rows))


@torch.no_grad()
def measure(
    frozen: FrozenDiffusersPipeline, num_steps: int, guidance_scale: float, num_prompts: int, group_size: int
) -> dict[str, float]:
    """Measure a model at one step count, from seeds that are the same for every model of its latents' shape."""
    rewards, strict, variety = [], [], []
    seconds = 0.0
    for number, scene in enumerate(held_out_scenes()[:num_prompts]):
        prompts = [scene.caption] * group_size
        zeros = torch.zeros(group_size, *frozen.latent_shape)
        latents, _ = gaussian_sample(zeros, torch.zeros(()), seed=number)
        embeds = frozen.encode(prompts)
        start = time.monotonic()
        images = frozen.generate(latents, embeds, num_inference_steps=num_steps, guidance_scale=guidance_scale)
        seconds += time.monotonic() - start
        result = score(images, prompts)
        rewards.append(result.reward)
        strict.append(result.strict)
        variety.append(mean_pairwise_distance(images[None].float()))
    reward = torch.stack(rewards)
    return {
        "reward": reward.mean().item(),
        "strict": torch.stack(strict).mean().item(),
        "best": reward.max(1).values.mean().item(),
        "variety": sum(variety) / len(variety),
        "pictures_per_s": num_prompts * group_size / seconds,
    }


if __name__ == "__main__":
    main()
