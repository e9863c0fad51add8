"""How long everything takes, beside what one would write instead."""
