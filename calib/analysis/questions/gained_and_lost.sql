-- The categories whose AP gained or lost most from run a to run b.
-- views: results
-- runs: a, b
-- options: limit
--
-- At most `limit` (10) that gained and as many that lost, the greatest gain first.
WITH moved AS (
    SELECT
        a.category_id,
        a.name,
        a.instance_count,
        a.n_gt,
        a.AP AS AP_a,
        b.AP AS AP_b,
        b.AP - a.AP AS difference
    FROM results AS a
    JOIN results AS b USING (category_id)
    WHERE a.run = getvariable('a') AND b.run = getvariable('b') AND a.AP >= 0 AND b.AP >= 0 AND a.AP != b.AP
)
SELECT *
FROM moved
QUALIFY
    (difference > 0 AND row_number() OVER (ORDER BY difference DESC, category_id)
        <= coalesce(getvariable('limit')::BIGINT, 10))
    OR (difference < 0 AND row_number() OVER (ORDER BY difference, category_id)
        <= coalesce(getvariable('limit')::BIGINT, 10))
ORDER BY difference DESC, category_id;
