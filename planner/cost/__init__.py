"""Money: schedules, spot's real price, lines of a bill, and what a cluster costs beside its GPUs."""
