"""Learn from recorded transitions of mixed quality, without an environment to act in; then record what was learned.

    python examples/from_recordings.py

The recording here is made of arrays. A `.npz` or D4RL-style HDF5 file, or a Minari dataset (`minari:ID`), goes the same
way: as `data=`, or on the command line as `--data`.
"""

from __future__ import annotations

import os
import tempfile

import rlkit
from rlkit.envs import offline
from rlkit.envs.coordination import twin_thrust_data
from rlkit.recording import record

recorded = offline.read(twin_thrust_data())  # a tenth of its episodes is good
print(f"recorded: {len(recorded.lengths)} episodes, mean return {recorded.returns.mean():.1f}")

agent = rlkit.ARSQ(
    "rlkit/TwinThrust-v0", data=recorded, offline_steps="all", seed=0, threads=1, gamma=0.95, levels=1, bins=15,
    bc_coef=0.1, batch_size=128, learning_rate=1e-3, policy_kwargs={"net_arch": [64, 64]},
)  # fmt: skip
agent.learn(600)
record_of = agent.evaluate(episodes=20)
print(f"learned offline: {record_of['eval/mean_reward']:.1f}, {record_of['eval/success_rate']:.0%} reach the goal")

with tempfile.TemporaryDirectory() as folder:
    os.environ["MINARI_DATASETS_PATH"] = folder  # otherwise ~/.minari
    made = record([agent], "thrust/learned-v0", episodes=10, deterministic=True)
    again = offline.read("minari:thrust/learned-v0")
    print(f"recorded anew: {len(again.lengths)} episodes, mean return {again.returns.mean():.1f}, {made.env_id}")
    best = again.band(50, 100)
    print(f"the better half: {len(best.lengths)} episodes, mean return {best.returns.mean():.1f}")
