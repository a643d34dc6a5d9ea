"""Rewards: black boxes from images and prompts to numbers, higher is better."""

from noisepolicy.rewards.base import Reward, RewardError, load_reward

__all__ = ["Reward", "RewardError", "load_reward"]
