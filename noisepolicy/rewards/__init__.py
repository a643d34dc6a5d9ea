"""Rewards: black boxes from images and prompts to numbers, higher is better."""

from noisepolicy.rewards.base import Reward, RewardError
from noisepolicy.rewards.registry import load_reward

__all__ = ["Reward", "RewardError", "load_reward"]
