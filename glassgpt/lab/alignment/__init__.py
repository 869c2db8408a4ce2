"""`glassgpt lab alignment`: PPO, DPO and GRPO side by side, with a reward that can be gamed."""
