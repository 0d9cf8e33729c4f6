"""Operations where time goes: a readable reference each, and faster implementations beside it."""
