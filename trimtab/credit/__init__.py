"""From rewards to advantages: who among the tokens earned what."""
