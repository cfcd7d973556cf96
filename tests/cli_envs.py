"""Environments under gymnasium ids, as another package registers its own: `cli_envs:DictCounter-v0`."""

from __future__ import annotations

import gymnasium as gym

gym.register("DictCounter-v0", "env_zoo:DictCounter", disable_env_checker=True)
gym.register("Broken-v0", "env_zoo:Broken", max_episode_steps=50, disable_env_checker=True)
