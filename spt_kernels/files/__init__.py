"""Files written whole or not at all, checked when read; how pictures look; imports on first use."""
