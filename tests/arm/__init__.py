"""The CPU backend on Arm processors, tried without one."""
