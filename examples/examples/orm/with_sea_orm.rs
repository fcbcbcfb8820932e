//! sea-orm, with an entity of its own for the order.

use anyhow::Result;
use outbox_mysql::{MySqlSchema, SqlValue};
use sea_orm::entity::prelude::*;
use sea_orm::{DatabaseTransaction, Set, Statement, TransactionTrait, Value};

use super::order_placed;

/// The table `orm_orders`.
#[sea_orm::model]
#[derive(Clone, Debug, PartialEq, Eq, DeriveEntityModel)]
#[sea_orm(table_name = "orm_orders")]
pub struct Model {
    #[sea_orm(primary_key, auto_increment = false)]
    pub id: String,
    pub state: String,
}

impl ActiveModelBehavior for ActiveModel {}

pub async fn place_orders(url: &str, schema: &MySqlSchema) -> Result<()> {
    let database = sea_orm::Database::connect(url).await?;
    let tx = database.begin().await?;
    place(&tx, schema, "sea-1").await?;
    tx.commit().await?;
    let tx = database.begin().await?;
    place(&tx, schema, "sea-rolled-back").await?;
    tx.rollback().await?;
    Ok(database.close().await?)
}

/// Takes a transaction: on the pool, the order and the message would be committed one by one.
async fn place(tx: &DatabaseTransaction, schema: &MySqlSchema, order: &str) -> Result<()> {
    let model = ActiveModel { id: Set(order.to_owned()), state: Set("placed".to_owned()) };
    Entity::insert(model).exec_without_returning(tx).await?;
    let insert = order_placed(schema, order)?;
    let values = insert.values().iter().map(value);
    let statement = Statement::from_sql_and_values(tx.get_database_backend(), insert.sql(), values);
    tx.execute_raw(statement).await?;
    Ok(())
}

fn value(value: &SqlValue) -> Value {
    match value {
        SqlValue::Null => Value::Bytes(None),
        SqlValue::Int(number) => Value::from(*number),
        SqlValue::Text(text) => Value::from(text.clone()),
        SqlValue::Bytes(bytes) => Value::from(bytes.clone()),
    }
}
