"""The trainers of this package: one line each; the class is imported at first use (see rlkit/registry.py)."""

from __future__ import annotations

from rlkit.registry import Entry

TRAINERS: dict[str, Entry] = {
    "sac": Entry(
        target="rlkit.trainers.sac:SAC",
        paper="Soft Actor-Critic Algorithms and Applications, arXiv:1812.05905",
        status="reproduced",
        data="Box-action environments, online",
        actions=("Box",),
    ),
    "pmoe": Entry(
        target="rlkit.trainers.pmoe:PMOE",
        paper="Probabilistic Mixture-of-Experts for Efficient Deep Reinforcement Learning, arXiv:2104.09122",
        status="reconstructed",
        data="Box-action environments, online",
        actions=("Box",),
    ),
    "pmoe_ppo": Entry(
        target="rlkit.trainers.pmoe_ppo:PMOEPPO",
        paper="Probabilistic Mixture-of-Experts for Efficient Deep Reinforcement Learning, arXiv:2104.09122",
        status="reconstructed",
        data="Box-action environments, online; with one expert (PPO) also Discrete ones",
        actions=("Box", "Discrete"),
    ),
    "arsq": Entry(
        target="rlkit.trainers.arsq:ARSQ",
        paper="Learning from Suboptimal Data in Continuous Control via Auto-Regressive Soft Q-Network, "
        "arXiv:2502.00288",
        status="reconstructed",
        data="Box-action environments, online, recorded transitions, or both",
        actions=("Box",),
    ),
    "cqn": Entry(
        target="rlkit.trainers.cqn:CQN",
        paper="Continuous Control with Coarse-to-fine Reinforcement Learning, arXiv:2407.07787",
        status="variant",
        data="Box-action environments, online, recorded transitions, or both",
        actions=("Box",),
    ),
    "dual_rl": Entry(
        target="rlkit.trainers.dual_rl:DualRL",
        paper="Dual RL: Unification and New Methods for Reinforcement and Imitation Learning, arXiv:2302.08560",
        status="reconstructed",
        data="recorded transitions of Box-action environments, then online",
        actions=("Box",),
    ),
    "recoil": Entry(
        target="rlkit.trainers.recoil:ReCOIL",
        paper="Dual RL: Unification and New Methods for Reinforcement and Imitation Learning, arXiv:2302.08560",
        status="reconstructed",
        data="expert and other transitions of Box-action environments, without rewards",
        actions=("Box",),
    ),
    "dr_rpo": Entry(
        target="rlkit.trainers.dr_rpo:DRRPO",
        paper="Policy Regularized Distributionally Robust Markov Decision Processes with Linear Function "
        "Approximation, arXiv:2510.14246",
        status="reconstructed",
        data="environments with discrete actions and linear features",
        actions=("Discrete",),
    ),
    "smodice": Entry(
        target="rlkit.trainers.smodice:SMODICE",
        paper="Versatile Offline Imitation from Observations and Examples via Regularized State-Occupancy Matching, "
        "arXiv:2202.02433",
        status="variant",
        data="expert and other transitions of Box-action environments, without rewards",
        actions=("Box",),
    ),
    "sft": Entry(
        target="rlkit.trainers.sft:SFT",
        paper="Training language models to follow instructions with human feedback, arXiv:2203.02155",
        status="reproduced",
        data="demonstrations or texts",
    ),
    "reward_model": Entry(
        target="rlkit.trainers.reward_model:RewardModel",
        paper="Training language models to follow instructions with human feedback, arXiv:2203.02155",
        status="reproduced",
        data="preference pairs",
    ),
    "dpo": Entry(
        target="rlkit.trainers.dpo:DPO",
        paper="Direct Preference Optimization, arXiv:2305.18290",
        status="reproduced",
        data="preference pairs",
    ),
}
